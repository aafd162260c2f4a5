"""Wakes an idle engine when the ledger changes, through the queue from which vLLM's loop reads its input."""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from kvcached_core import config
from kvcached_core.errors import UnsupportedError


def install() -> None:
    """Wrap `EngineCoreProc._process_input_queue` to start the idle waker. A second call does nothing."""
    original = EngineCoreProc._process_input_queue
    if getattr(original, "_kvcached", False):
        return

    @functools.wraps(original)
    def process_input_queue(self: Any) -> Any:
        memory = getattr(self.scheduler, "kv_memory", None)
        if memory is None:
            _refuse_stock(self)
        elif not memory.has_idle_waker:
            memory.start_idle_waker(
                functools.partial(self.input_queue.put_nowait, (EngineCoreRequestType.WAKEUP, None))
            )
        return original(self)

    process_input_queue._kvcached = True  # type: ignore[attr-defined]
    EngineCoreProc._process_input_queue = process_input_queue


def install_if_asked_for() -> None:
    """If ENABLE_KVCACHED is on, install the wrapper, so that an engine that is stock all the same fails."""
    if config.enabled(os.environ):
        install()


def _refuse_stock(core: Any) -> None:
    """If ENABLE_KVCACHED is on, make this stock engine answer its first call with an error.

    The client waits for that answer, and would wait for ever if the engine died instead.
    """
    if not config.enabled(os.environ):
        return
    error = UnsupportedError(
        f"{config.SWITCH_VARIABLE} is on, but this engine was made with {type(core.scheduler).__name__} "
        f"and without the elastic KV cache: use LLM(..., **vllm_kvcached.llm_kwargs()), "
        f"or unset {config.SWITCH_VARIABLE}"
    )

    def refuse(*_: Any) -> None:
        raise error

    core.get_supported_tasks = core.add_request = refuse
