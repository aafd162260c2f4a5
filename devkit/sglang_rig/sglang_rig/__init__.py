"""A plugin of SGLang that breaks an invariant on request: the tests have to notice it.

And one thing that SGLang lacks on a CPU: `SGLANG_RIG=windows` offers the attention backend `windows`.

`SGLANG_RIG=saboteur`: a scheduler unmaps on SIGUSR1 every granule but the first, no matter who uses it, and
overwrites them with noise on SIGUSR2. `SGLANG_RIG=forget`: a scheduler forgets whatever plugins have hooked.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcached_core.worker.pool import ElasticPool

WINDOWS = "windows"


def register() -> None:
    """SGLang's entry point; does harm in a scheduler's process only."""
    if os.environ.get("SGLANG_RIG") == WINDOWS:
        _offer_windows()
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    match os.environ.get("SGLANG_RIG"):
        case "saboteur":
            signal.signal(signal.SIGUSR1, _unmap)
            signal.signal(signal.SIGUSR2, _overwrite)
        case "forget":
            from sglang.srt.plugins.hook_registry import HookRegistry

            HookRegistry.apply_hooks = classmethod(lambda registry: None)


def _unmap(*_: Any) -> None:
    from devkit import sabotage

    print(f"rig: {sabotage.unmap(_pool())} granules unmapped", flush=True)


def _overwrite(*_: Any) -> None:
    from devkit import sabotage

    print(f"rig: {sabotage.overwrite(_pool())} granules overwritten", flush=True)


def _pool() -> ElasticPool:
    """Return the pool of this process."""
    from sglang_kvcached import process_state

    return process_state.rank_memory().pool


def _offer_windows() -> None:
    """Have SGLang know the attention backend of this name, on its command line too."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    def make(runner: Any) -> Any:
        return importlib.import_module("sglang_rig.windows").WindowsBackend(runner)

    register_attention_backend(WINDOWS)(make)
    if WINDOWS not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([WINDOWS])
