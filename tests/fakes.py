"""A device and a ledger account that do exactly what a test says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo, side_by_side
from kvcached_core.driver.handle_table import HandleTable
from kvcached_core.errors import CapacityError, InvariantError

OWN_STREAM = 1 << 20


class FakeFence(NamedTuple):
    """A place in one of the two lines of work."""

    own: bool
    number: int


class Line:
    """Work in order: 0 <= seen <= completed <= launched. `seen` is what the caller knows to be complete."""

    def __init__(self) -> None:
        self.launched = self.completed = self.seen = 0

    def complete(self, work: int) -> None:
        """Finish all work up to this number."""
        self.completed = max(self.completed, min(work, self.launched))


class FakeDriver:
    """A device without memory. Work is numbered; a fence is the number of the last work before it.

    The engine's streams are one line of work, the driver's own stream is another. What is complete by luck
    does not count: a page may be unmapped only when a fence behind its work was seen to pass, and read only
    by a stream that follows its zeroing, or after that was seen.
    """

    name = "fake"
    granularity_bytes = 64
    max_mappings = 1 << 20

    def __init__(self, capacity_bytes: int, patience: int | None = None) -> None:
        """`patience`: how often a fence may be asked in vain before it passes; None: until complete()."""
        self.capacity_bytes = capacity_bytes
        self.table = HandleTable()
        self.patience = patience
        self.engine, self.own = Line(), Line()
        self.creates = 0
        self.follows = 0
        self.closed = False
        self._numbers = itertools.count(1)
        self._used_by: dict[int, int] = {}  # address -> the last work of the engine that touches it
        self._zeroed_by: dict[int, int] = {}  # address -> the work of the own stream that zeroes it
        self._followed: dict[int, int] = {}  # stream -> the work of the own stream that it waits for
        self._gates: list[tuple[int, int]] = []  # (a wait in the engine's line, own work that it waits for)
        self._asked = 0

    @property
    def launched(self) -> int:
        """The engine's last work."""
        return self.engine.launched

    @property
    def completed(self) -> int:
        """The engine's last work that is complete."""
        return self.engine.completed

    def launch(self, offsets: Iterable[int] | None = None, stream: int = 0) -> None:
        """Start work that touches pages, by offset in the one range (None: all that are mapped)."""
        (base,) = self.table.ranges
        self.engine.launched += 1
        pages = self.table.mappings if offsets is None else [base + offset for offset in offsets]
        known = max(self.own.seen, self._followed.get(stream, 0))
        for address in pages:
            if address not in self.table.mappings:
                raise InvariantError("I5: a step touches a page that is not mapped")
            if self._zeroed_by.get(address, 0) > known:
                raise InvariantError("a step reads a page and does not wait until it is zeroed")
            self._used_by[address] = self.engine.launched

    def complete(self, work: int) -> None:
        """Finish the engine's work up to this number, and what it waits for."""
        self.engine.complete(work)
        self.own.complete(self._waited_for(self.engine.completed))

    def complete_own(self, work: int) -> None:
        """Finish zeroing up to this number."""
        self.own.complete(work)

    def held_bytes(self) -> int:
        """Return what all live handles have."""
        return sum(self.table.sizes.values())

    def identity(self) -> DeviceIdentity:
        """Return a made-up identity."""
        return DeviceIdentity("FAKE-0", "fake")

    def memory(self) -> MemoryInfo:
        """Return what is left."""
        return MemoryInfo(max(0, self.capacity_bytes - self.held_bytes()), self.capacity_bytes)

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses that never come again."""
        address = next(self._numbers) << 40
        self.table.ranges[address] = size_bytes
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Return addresses."""
        self.table.check_unreservable(address, size_bytes)
        del self.table.ranges[address]

    def create(self, size_bytes: int) -> int:
        """Create a handle if it fits."""
        self.creates += 1
        if self.memory().free_bytes < size_bytes:
            raise CapacityError("fake: full")
        handle = next(self._numbers)
        self.table.sizes[handle] = size_bytes
        return handle

    def clean(self, handle: int) -> None:
        """Check that it could be cleaned."""
        self.table.check_releasable(handle)

    def release(self, handle: int) -> None:
        """Free a handle."""
        self.table.check_releasable(handle)
        self.table.released(handle)

    def map(self, address: int, page_bytes: int, handles: Sequence[int], stream: int = 0) -> None:
        """Map; zeroing the pages is work on the stream."""
        line, work = (self.own, self._zeroed_by) if stream == OWN_STREAM else (self.engine, self._used_by)
        self.table.check_mappable(address, page_bytes, handles, exclusive=True)
        line.launched += 1
        for page, handle in side_by_side(address, page_bytes, handles):
            self.table.mapped(page, page_bytes, handle)
            work[page] = line.launched

    def alias(self, address: int, size_bytes: int, handle: int) -> None:
        """Map once more."""
        self.table.check_mappable(address, size_bytes, [handle], exclusive=False)
        self.table.mapped(address, size_bytes, handle)

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Unmap; I6 is checked here."""
        pages = self.table.unmappable(address, page_bytes, count)
        for page in pages:
            if self._used_by.get(page, 0) > self.engine.seen or self._zeroed_by.get(page, 0) > self.own.seen:
                raise InvariantError("I6: a page was unmapped while work that touches it may be running")
        for page in pages:
            self.table.unmapped(page)
            self._used_by.pop(page, None)
            self._zeroed_by.pop(page, None)

    def tensor(self, address: int, size_bytes: int) -> Any:
        """Return what tells a test which range it was."""
        return (address, size_bytes)

    def record(self, stream: int) -> FakeFence:
        """Return the stream's last work so far."""
        own = stream == OWN_STREAM
        return FakeFence(own, (self.own if own else self.engine).launched)

    def passed(self, fence: FakeFence) -> bool:
        """Compare with what is complete."""
        line = self.own if fence.own else self.engine
        if fence.number > line.completed and self.patience is not None:
            self._asked += 1
            if self._asked > self.patience:
                self._asked = 0
                (self.complete_own if fence.own else self.complete)(fence.number)
        if fence.number > line.completed:
            return False
        line.seen = max(line.seen, fence.number)
        self.own.seen = max(self.own.seen, self._waited_for(self.engine.seen))
        return True

    def own_stream(self) -> int:
        """Return another stream than any of the engine's."""
        return OWN_STREAM

    def follow(self, stream: int, fence: FakeFence) -> None:
        """Put a fence of the own stream before all later work of one of the engine's."""
        assert fence.own and stream != OWN_STREAM
        self.follows += 1
        self._followed[stream] = max(self._followed.get(stream, 0), fence.number)
        self.engine.launched += 1  # the wait is work too: a fence recorded now is behind it
        self._gates.append((self.engine.launched, fence.number))

    def synchronize(self) -> None:
        """Finish all work."""
        for line in (self.engine, self.own):
            line.seen = line.completed = line.launched

    def close(self) -> None:
        """Free everything."""
        self.closed = True
        self.table = HandleTable(self.table.ranges)

    def _waited_for(self, work: int) -> int:
        """Return the zeroing that is complete if the engine's work up to this number is."""
        return max((own for at, own in self._gates if at <= work), default=0)
