"""What the ranks of one engine tell each other, through vLLM's own process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvcached_core.errors import CapacityError, KVCachedError


def gather(mine: Any) -> list[Any]:
    """Return what every rank of this engine says, by rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [mine]
    from vllm.distributed.parallel_state import get_world_group

    said: list[Any] = [None] * get_world_group().world_size
    torch.distributed.all_gather_object(said, mine, group=get_world_group().cpu_group)
    return said


def in_device_order(
    device: str, wait: Callable[[], None], gather: Callable[[Any], list[Any]] = gather
) -> None:
    """Let the ranks `wait` one device after the other, in an order that all engines share.

    So of two engines that want the same devices none holds one while it waits for another that the other
    holds. What one rank raises, all raise.
    """
    for current in sorted(set(gather(device))):
        refusal: KVCachedError | None = None
        if current == device:
            try:
                wait()
            except KVCachedError as error:
                refusal = error
        refused = [text for text in gather(str(refusal) if refusal else None) if text]
        if refused:
            raise refusal or CapacityError(refused[0])
