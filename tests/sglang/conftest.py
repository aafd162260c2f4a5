"""Imports SGLang once before the tests, so that its own warnings fail none of them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator

import pytest

IMPORTED = (
    "sglang.srt.server_args",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.mem_cache.kv_cache_configurator",
)

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob.append("test_*.py")
else:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # before the platform is chosen, which is at import
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(name)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Restore the levels of this project's loggers, which an engine's start changes."""
    loggers = [logging.getLogger(name) for name in ("kvcached_core", "sglang_kvcached")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
