"""A process's device memory outside the KV cache: weights, activations, graphs, context."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reserved_bytes(device: torch.device | int) -> int:
    """Return the bytes that PyTorch's allocator holds on a CUDA device.

    torch.cuda.memory_reserved() returns the same, but sorts two hundred statistics for it.
    """
    import torch

    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["reserved_bytes"]["all"]["current"]) if stats else 0


class PrivateMemory:
    """Measures memory outside the KV cache. Always 0 on the host: the system's free figure covers it."""

    def __init__(
        self, reserved: Callable[[], int] | None, process: Callable[[], int], kv_bytes: Callable[[], int]
    ) -> None:
        """Each argument returns bytes: `reserved` those of PyTorch's allocator (None on the host), `process`
        the driver's count for this process (0: unknown), `kv_bytes` the KV cache's part of `process`.
        """
        self._reserved = reserved
        self._process = process
        self._kv_bytes = kv_bytes
        self.absent_bytes = 0  # the part of `reserved` that is not in memory while the engine sleeps
        self._beside_bytes = 0  # context, communication, graphs; grows while the engine loads

    def measure(self) -> int:
        """Ask the driver and return the bytes. Too slow for a step; callable from any thread."""
        if self._reserved is None:
            return 0
        reserved_bytes = self._present(self._reserved)
        self._beside_bytes = max(0, self._process() - reserved_bytes - self._kv_bytes())
        return reserved_bytes + self._beside_bytes

    def now(self) -> int:
        """Return the allocator's bytes now, plus the rest as measured last. Callable from any thread."""
        return 0 if self._reserved is None else self._present(self._reserved) + self._beside_bytes

    def _present(self, reserved: Callable[[], int]) -> int:
        """Return the allocator's bytes that have memory behind them."""
        return max(0, reserved() - self.absent_bytes)
