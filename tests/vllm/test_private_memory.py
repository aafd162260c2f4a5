"""What a worker takes outside its KV cache, with and without a management library that tells."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.units import GIB
from vllm_kvcached import nvml
from vllm_kvcached.private_memory import PrivateMemory

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
DEVICE = "GPU-1"


class Library(ModuleType):
    """NVML with these processes on its device."""

    def __init__(self, *processes: tuple[int, int | None]) -> None:
        super().__init__("pynvml")
        self.processes = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != DEVICE:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return self.processes

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(free=1, total=2)


def use(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this the library that vLLM brings."""
    import vllm.third_party

    monkeypatch.setattr(vllm.third_party, "pynvml", library, raising=False)
    monkeypatch.setitem(sys.modules, "vllm.third_party.pynvml", library)


def test_the_context_counts_where_the_driver_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15 * GIB)
    use(Library((1, 70 * GIB), (os.getpid(), 18 * GIB)), monkeypatch)
    private = PrivateMemory(CUDA, DEVICE, lambda: 2 * GIB)
    assert private.now() == 15 * GIB
    assert private.measure() == private.now() == 16 * GIB
    assert PrivateMemory(CPU, DEVICE, lambda: 0).measure() == 0
    assert nvml.memory_of(DEVICE) == MemoryInfo(1, 2)


@pytest.mark.parametrize("processes", [[], [(1, 70 * GIB)], [(os.getpid(), None)]])
def test_where_the_driver_does_not_tell_what_torch_holds_counts(
    processes: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15 * GIB)
    use(Library(*processes), monkeypatch)
    assert PrivateMemory(CUDA, DEVICE, lambda: 2 * GIB).measure() == 15 * GIB
    assert PrivateMemory(CUDA, "MIG-unknown", lambda: 2 * GIB).measure() == 15 * GIB


def test_without_the_library_the_device_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvml.uuid_of(0) is None
