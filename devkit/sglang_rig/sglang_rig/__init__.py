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
from typing import Any

import torch

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


def _granules() -> tuple[Any, list[int]]:
    """Return the pool of this process and its mapped granules but the first."""
    from sglang_kvcached import process_state

    pool = process_state.rank_memory().pool
    return pool, [granule for granule in pool._arenas.mapped if granule != 0]


def _unmap(*_: Any) -> None:
    pool, granules = _granules()
    for granule in granules:
        pool._arenas.unmap(granule)
    print(f"rig: {len(granules)} granules unmapped", flush=True)


def _overwrite(*_: Any) -> None:
    pool, granules = _granules()
    generator = torch.Generator().manual_seed(7)
    for granule in granules:
        for offset in pool._geometry.ranges(granule):
            page = pool.tensor[offset : offset + pool._geometry.page_bytes].view(torch.float32)
            page.normal_(generator=generator)
    print(f"rig: {len(granules)} granules overwritten", flush=True)


def _offer_windows() -> None:
    """Have SGLang know the attention backend of this name, on its command line too."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    def make(runner: Any) -> Any:
        return importlib.import_module("sglang_rig.windows").WindowsBackend(runner)

    register_attention_backend(WINDOWS)(make)
    if WINDOWS not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([WINDOWS])
