"""What a worker takes of its device outside the KV cache: weights, activations, graphs, context."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_kvcached import nvml


class PrivateMemory:
    """On the host it is the system's to know, and 0 here: free memory there is what nobody takes."""

    def __init__(self, device: torch.device, uuid: str, kv_bytes: Callable[[], int]) -> None:
        """`kv_bytes` is what the KV cache has of the process's memory."""
        self._device = device
        self._uuid = uuid
        self._kv_bytes = kv_bytes
        self._beside_torch_bytes = 0  # context, communication, graphs: grows while the engine loads

    def measure(self) -> int:
        """Ask the driver; not for the step path. Callable from any thread."""
        if self._device.type == "cpu":
            return 0
        reserved_bytes = self._reserved_bytes()
        beside_bytes = nvml.process_bytes(self._uuid) - reserved_bytes - self._kv_bytes()
        self._beside_torch_bytes = max(0, beside_bytes)
        return reserved_bytes + self._beside_torch_bytes

    def now(self) -> int:
        """Return what torch holds, and the rest as last measured. Callable from any thread."""
        return 0 if self._device.type == "cpu" else self._reserved_bytes() + self._beside_torch_bytes

    def _reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))
