"""Exchange between the ranks of one engine, through vLLM's own process group."""

from __future__ import annotations

from typing import Any

import torch


def gather(mine: Any) -> list[Any]:
    """Return the values `mine` of all ranks of this engine, in the order of ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [mine]
    from vllm.distributed.parallel_state import get_world_group

    gathered: list[Any] = [None] * get_world_group().world_size
    torch.distributed.all_gather_object(gathered, mine, group=get_world_group().cpu_group)
    return gathered
