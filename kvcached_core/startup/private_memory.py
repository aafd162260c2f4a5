"""What a process takes of its device outside the KV cache: weights, activations, graphs, context."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reserved_bytes(device: torch.device | int) -> int:
    """Return what PyTorch's allocator holds of a CUDA device.

    torch.cuda.memory_reserved() says the same, and puts two hundred numbers in order for it.
    """
    import torch

    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["reserved_bytes"]["all"]["current"]) if stats else 0


class PrivateMemory:
    """On the host it is the system's to know, and 0 here: free memory there is what nobody takes."""

    def __init__(
        self, reserved: Callable[[], int] | None, process: Callable[[], int], kv_bytes: Callable[[], int]
    ) -> None:
        """All three return bytes now: `reserved` what the tensors' allocator holds (None on the host),
        `process` what the driver counts for the process (0: unknown), `kv_bytes` the KV cache's part of that.
        """
        self._reserved = reserved
        self._process = process
        self._kv_bytes = kv_bytes
        self.absent_bytes = 0  # of `reserved`, what has no memory behind it while the engine sleeps
        self._beside_bytes = 0  # context, communication, graphs: grows while the engine loads

    def measure(self) -> int:
        """Ask the driver; not for the step path. Callable from any thread."""
        if self._reserved is None:
            return 0
        reserved_bytes = self._present(self._reserved)
        self._beside_bytes = max(0, self._process() - reserved_bytes - self._kv_bytes())
        return reserved_bytes + self._beside_bytes

    def now(self) -> int:
        """Return what the allocator holds, and the rest as last measured. Callable from any thread."""
        return 0 if self._reserved is None else self._present(self._reserved) + self._beside_bytes

    def _present(self, reserved: Callable[[], int]) -> int:
        """Return what the allocator holds that has memory behind it."""
        return max(0, reserved() - self.absent_bytes)
