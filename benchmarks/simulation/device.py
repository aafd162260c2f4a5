"""A simulated device without memory: it counts handles, and driver calls take simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from benchmarks.simulation.clockwork import Process
from kvcached_core.driver.base import DeviceIdentity, Handle, MemoryInfo, side_by_side
from kvcached_core.driver.handle_table import HandleTable
from kvcached_core.errors import CapacityError

CALL_SECONDS = 37e-6  # time to create, map, unmap or release a page, as measured on an H100


class Device:
    """The free and total bytes of the device."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = self.free_bytes = capacity_bytes


class SimulatedDriver:
    """One owner's driver. Kernels end with their step, so all fences have passed.

    In `create` and `release` the process `worker` sleeps. Maps and unmaps run under the pool's locks, so they
    do not sleep: their time is added up, and the caller sleeps for `debt_seconds` afterwards.
    """

    name = "simulated"
    granularity_bytes = 1 << 20
    max_mappings = 1 << 30

    def __init__(self, device: Device) -> None:
        self._device = device
        self._table = HandleTable()
        self._numbers = count(1)
        self._debt_seconds = 0.0
        self.worker: Process | None = None  # None: create and release take no time
        self.calls = 0

    def debt_seconds(self) -> float:
        """Return the seconds that maps and unmaps have cost since the last call of this method."""
        debt, self._debt_seconds = self._debt_seconds, 0.0
        return debt

    def identity(self) -> DeviceIdentity:
        """Return a made-up identity."""
        return DeviceIdentity("SIMULATED-0", "simulated")

    def memory(self) -> MemoryInfo:
        """Return the free and total bytes of the device."""
        return MemoryInfo(self._device.free_bytes, self._device.capacity_bytes)

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses that are never reused."""
        address = next(self._numbers) << 48
        self._table.ranges[address] = size_bytes
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Return addresses."""
        self._table.check_unreservable(address, size_bytes)
        del self._table.ranges[address]

    def create(self, size_bytes: int) -> Handle:
        """Take memory of the device."""
        self._spend()
        if self._device.free_bytes < size_bytes:
            raise CapacityError("the simulated device is full")
        self._device.free_bytes -= size_bytes
        handle = next(self._numbers)
        self._table.sizes[handle] = size_bytes
        return handle

    def clean(self, handle: Handle) -> None:
        """Do nothing: the cost of cleaning is part of the unmap."""

    def release(self, handle: Handle) -> None:
        """Give memory back to the device."""
        size_bytes = self._table.check_releasable(handle)
        self._spend()
        self._table.released(handle)
        self._device.free_bytes += size_bytes

    def map(self, address: int, page_bytes: int, handles: Sequence[Handle], stream: int = 0) -> None:
        """Map."""
        self._table.check_mappable(address, page_bytes, handles, exclusive=True)
        for page, handle in side_by_side(address, page_bytes, handles):
            self._table.mapped(page, page_bytes, handle)
            self._owe()

    def alias(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Map a handle at a second address."""
        self._table.check_mappable(address, size_bytes, [handle], exclusive=False)
        self._table.mapped(address, size_bytes, handle)

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Unmap."""
        for page in self._table.unmappable(address, page_bytes, count):
            self._table.unmapped(page)
            self._owe()

    def tensor(self, address: int, size_bytes: int) -> None:
        """Return nothing: no kernel runs."""

    def record(self, stream: int) -> int:
        """Return the stream."""
        return stream

    def passed(self, fence: int) -> bool:
        """Return True: all fences have passed."""
        return True

    def own_stream(self) -> int:
        """Return the driver's own stream, which the engine does not use."""
        return 1

    def follow(self, stream: int, fence: int) -> None:
        """Do nothing: zeroing is complete already."""

    def synchronize(self) -> None:
        """Do nothing: all work is complete already."""

    def close(self) -> None:
        """Give all remaining memory back to the device."""
        self._device.free_bytes += sum(self._table.sizes.values())
        self._table = HandleTable(self._table.ranges)

    def _spend(self) -> None:
        self.calls += 1
        if self.worker is not None:
            self.worker.sleep(CALL_SECONDS + self.debt_seconds())

    def _owe(self) -> None:
        self.calls += 1
        self._debt_seconds += CALL_SECONDS
