"""The memory of a process outside its KV cache, and NVML's readings of devices."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.driver import nvml
from kvcached_core.driver.base import MemoryInfo
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.units import GIB

DEVICES = ("GPU-aaaa-1", "GPU-bbbb-2")


class Library:
    """NVML with two devices, and these processes on the first."""

    def __init__(self, *processes: tuple[int, int | None]) -> None:
        self.processes = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]

    def nvmlDeviceGetCount(self) -> int:
        return len(DEVICES)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return DEVICES[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != DEVICES[0]:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return self.processes

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(free=1, total=2)


def test_what_the_driver_counts_beyond_the_allocator_and_the_cache_is_private_too() -> None:
    process_bytes = 18 * GIB
    private = PrivateMemory(lambda: 15 * GIB, lambda: process_bytes, lambda: 2 * GIB)
    assert private.now() == 15 * GIB, "nothing was measured yet"
    assert private.measure() == private.now() == 16 * GIB
    process_bytes = 0
    assert private.measure() == private.now() == 15 * GIB, "where the driver does not tell"


def test_what_the_allocator_counts_of_freed_weights_is_not_private_while_the_engine_sleeps() -> None:
    process_bytes = 18 * GIB
    private = PrivateMemory(lambda: 15 * GIB, lambda: process_bytes, lambda: 2 * GIB)
    assert private.measure() == 16 * GIB
    process_bytes, private.absent_bytes = 4 * GIB, 14 * GIB
    assert private.measure() == private.now() == 2 * GIB
    process_bytes = 0
    assert private.measure() == private.now() == GIB, "where the driver does not tell"
    private.absent_bytes = 0
    assert private.now() == 15 * GIB, "awake again"


def test_on_the_host_nothing_is_counted() -> None:
    private = PrivateMemory(None, lambda: GIB, lambda: 0)
    assert private.measure() == private.now() == 0


@pytest.mark.parametrize(
    ("processes", "expected"),
    [([], 0), ([(1, GIB)], 0), ([(os.getpid(), None)], 0), ([(1, GIB), (os.getpid(), 3 * GIB)], 3 * GIB)],
)
def test_only_this_process_is_counted(processes: list[tuple[int, int | None]], expected: int) -> None:
    library = Library(*processes)
    assert nvml.process_bytes(DEVICES[0], lambda: library) == expected
    assert nvml.process_bytes("MIG-unknown", lambda: library) == 0


def test_free_memory_is_known_without_a_context() -> None:
    assert nvml.memory_of(DEVICES[0], Library) == MemoryInfo(1, 2)


@pytest.mark.parametrize(
    ("visible", "index", "uuid"),
    [
        ("0,1", 1, DEVICES[1]),
        ("1", 0, DEVICES[1]),
        (" 1, 0", 0, DEVICES[1]),
        ("GPU-bbbb", 0, DEVICES[1]),
        ("MIG-x,0", 0, "MIG-x"),
        ("GPU-", 0, None),  # of both devices
        ("0", 1, None),
        ("", 0, None),
    ],
)
def test_a_device_is_known_by_the_number_that_cuda_gives_it(
    visible: str, index: int, uuid: str | None
) -> None:
    assert nvml.uuid_of(index, Library, visible) == uuid


def test_without_a_variable_devices_count_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvml.uuid_of(1, Library) == DEVICES[1]
