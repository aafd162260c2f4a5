"""Elastic KV cache for stock vLLM, registered through its general plugins.

`vllm serve MODEL --kv-cache-backend kvcached`, or `ENABLE_KVCACHED=true vllm serve MODEL`, or in Python
`LLM(model, **vllm_kvcached.llm_kwargs())`.
"""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

from vllm_kvcached.names import RUN_VARIABLE, SCHEDULER, WORKER

__version__ = "0.1.0"
__all__ = ["RUN_VARIABLE", "SCHEDULER", "WORKER", "__version__", "llm_kwargs", "register"]


def register() -> None:
    """Add the flag and the wrapper that wakes idle engines. vLLM calls this in every process."""
    os.environ.setdefault(RUN_VARIABLE, secrets.token_hex(6))
    if "vllm.engine.arg_utils" in sys.modules:
        from vllm_kvcached import flag

        flag.install()
    if "vllm.v1.engine.core" in sys.modules:
        from vllm_kvcached import wake

        wake.install_if_asked_for()


def llm_kwargs(**options: Any) -> dict[str, Any]:
    """Return the keyword arguments that make `vllm.LLM` elastic; `options` are settings as in docs/vllm.md.

    Raises ConfigError for an unknown or illegal setting, UnsupportedError for an unusable vLLM.
    """
    from kvcached_core import config
    from vllm_kvcached import seams

    config.load(options, os.environ)
    seams.require()
    return {
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "additional_config": {"kvcached": options},
    }
