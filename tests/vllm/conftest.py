"""Imports vLLM once before the tests, so that its own warnings fail none of them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

IMPORTED = (
    "vllm.engine.arg_utils",
    "vllm.v1.core.block_pool",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.engine.core",
    "vllm_kvcached.worker",
)

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob.append("test_*.py")
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)
