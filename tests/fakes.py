"""A device and a ledger account that do exactly what a test says."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable
from typing import Any

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.driver.book import Book
from kvcached_core.errors import BusyError, CapacityError, InvariantError


class FakeDriver:
    """A device without memory. Work is numbered; a fence is the number of the last work before it."""

    name = "fake"
    granularity_bytes = 64
    max_mappings = 1 << 20

    def __init__(self, capacity_bytes: int, patience: int | None = None) -> None:
        """`patience`: how often a fence may be asked in vain before it passes; None: until complete()."""
        self.capacity_bytes = capacity_bytes
        self.book = Book()
        self.patience = patience
        self.launched = self.completed = 0
        self.creates = 0
        self.closed = False
        self._numbers = itertools.count(1)
        self._used_by: dict[int, int] = {}  # address -> the last work that touches it
        self._asked = 0

    def launch(self, offsets: Iterable[int] | None = None) -> None:
        """Start work that touches pages, by offset in the one range (None: all that are mapped)."""
        (base,) = self.book.ranges
        self.launched += 1
        pages = self.book.mappings if offsets is None else [base + offset for offset in offsets]
        for address in pages:
            if address not in self.book.mappings:
                raise InvariantError("I5: a step touches a page that is not mapped")
            self._used_by[address] = self.launched

    def complete(self, work: int) -> None:
        """Finish all work up to this number."""
        self.completed = max(self.completed, min(work, self.launched))

    def held_bytes(self) -> int:
        """Return what all live handles have."""
        return sum(self.book.sizes.values())

    def identity(self) -> DeviceIdentity:
        """Return a made-up identity."""
        return DeviceIdentity("FAKE-0", "fake")

    def memory(self) -> MemoryInfo:
        """Return what is left."""
        return MemoryInfo(max(0, self.capacity_bytes - self.held_bytes()), self.capacity_bytes)

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses that never come again."""
        address = next(self._numbers) << 40
        self.book.ranges[address] = size_bytes
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Return addresses."""
        self.book.check_unreservable(address, size_bytes)
        del self.book.ranges[address]

    def create(self, size_bytes: int) -> int:
        """Create a handle if it fits."""
        self.creates += 1
        if self.memory().free_bytes < size_bytes:
            raise CapacityError("fake: full")
        handle = next(self._numbers)
        self.book.sizes[handle] = size_bytes
        return handle

    def clean(self, handle: int) -> None:
        """Check that it could be cleaned."""
        self.book.check_releasable(handle)

    def release(self, handle: int) -> None:
        """Free a handle."""
        self.book.check_releasable(handle)
        self.book.released(handle)

    def map(self, address: int, size_bytes: int, handle: int, stream: int = 0) -> None:
        """Map; zeroing the page is work on the stream."""
        self.book.check_mappable(address, size_bytes, handle, exclusive=True)
        self.book.mapped(address, size_bytes, handle)
        self.launched += 1
        self._used_by[address] = self.launched

    def alias(self, address: int, size_bytes: int, handle: int) -> None:
        """Map once more."""
        self.book.check_mappable(address, size_bytes, handle, exclusive=False)
        self.book.mapped(address, size_bytes, handle)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Unmap; I6 is checked here."""
        self.book.check_unmappable(address, size_bytes)
        if self._used_by.get(address, 0) > self.completed:
            raise InvariantError("I6: a page was unmapped while work that touches it was running")
        self.book.unmapped(address)
        self._used_by.pop(address, None)

    def tensor(self, address: int, size_bytes: int) -> Any:
        """Return what tells a test which range it was."""
        return (address, size_bytes)

    def record(self, stream: int) -> int:
        """Return the last work so far."""
        return self.launched

    def passed(self, fence: int) -> bool:
        """Compare with what is complete."""
        if fence > self.completed and self.patience is not None:
            self._asked += 1
            if self._asked > self.patience:
                self._asked = 0
                self.complete(fence)
        return fence <= self.completed

    def synchronize(self) -> None:
        """Finish all work."""
        self.complete(self.launched)

    def close(self) -> None:
        """Free everything."""
        self.closed = True
        self.book = Book(self.book.ranges)


class FakeAccount:
    """An account in a ledger of one. `busy` counts down: that many calls find it locked."""

    def __init__(self, granule_bytes: int, limit_bytes: int, notify_at: int = 0) -> None:
        self.reached = threading.Event()  # set when `notify_at` granules have been created
        self._notify_at = notify_at
        self.granule_bytes = granule_bytes
        self.limit_bytes = limit_bytes
        self.wanted_bytes = 0
        self.leased_bytes = self.ready_bytes = 0
        self.created_granules = self.released_granules = 0
        self.demand_bytes = 0
        self.published = (0, 0)
        self.maps = self.unmaps = 0
        self.acknowledged = 0
        self.busy = 0
        self.denied = False
        self.leases = 0
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def want(self, granules: int) -> None:
        """Write the wish and ring."""
        self.wanted_bytes = granules * self.granule_bytes
        os.eventfd_write(self._bell, 1)

    def fileno(self) -> int:
        """Return the bell."""
        return self._bell

    def drain(self) -> None:
        """Empty the bell."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return

    def acknowledge(self) -> None:
        """Count."""
        self._lock()
        self.acknowledged += 1

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Grant whole granules below the limit and below what is free and not promised."""
        self._lock()
        self.leases += 1
        room = min(self.limit_bytes, memory.free_bytes + self.ready_bytes) - self.leased_bytes
        granted = (
            0 if self.denied else max(0, min(want_bytes, room)) // self.granule_bytes * self.granule_bytes
        )
        self.leased_bytes += granted
        self.demand_bytes = want_bytes - granted
        return granted

    def created(self, granules: int) -> None:
        """Count granules."""
        self._lock()
        self.created_granules += granules
        self.ready_bytes += granules * self.granule_bytes
        if self.created_granules >= self._notify_at:
            self.reached.set()

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0) -> None:
        """Lower the promise."""
        self._lock()
        self.released_granules += granules_released
        self.ready_bytes -= granules_released * self.granule_bytes
        self.leased_bytes -= granules_released * self.granule_bytes + bytes_never_ready

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0) -> None:
        """Keep."""
        self._lock()
        assert mapped_bytes <= self.ready_bytes, "I2"
        self.maps, self.unmaps = self.maps + maps, self.unmaps + unmaps
        self.published = (mapped_bytes, private_now_bytes)

    def refuse(self, unmet_bytes: int) -> None:
        """Keep."""
        self._lock()
        self.demand_bytes = unmet_bytes

    def close(self) -> None:
        """Give the bell back."""
        os.close(self._bell)

    def _lock(self) -> None:
        if self.busy:
            self.busy -= 1
            raise BusyError("fake: locked")
