"""What the ranks of one engine tell each other, through vLLM's own process group."""

from __future__ import annotations

from typing import Any

import torch


def gather(mine: Any) -> list[Any]:
    """Return what every rank of this engine says, by rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [mine]
    from vllm.distributed.parallel_state import get_world_group

    said: list[Any] = [None] * get_world_group().world_size
    torch.distributed.all_gather_object(said, mine, group=get_world_group().cpu_group)
    return said
