"""A fake device driver that does exactly what a test says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo, side_by_side
from kvcached_core.driver.handle_table import HandleTable
from kvcached_core.errors import CapacityError, InvariantError

OWN_STREAM = 1 << 20


class FakeFence(NamedTuple):
    """A position in one of the two queues of work."""

    own: bool
    number: int


class Line:
    """A queue of work: 0 <= seen <= completed <= launched. The caller knows that `seen` is complete."""

    def __init__(self) -> None:
        self.launched = self.completed = self.seen = 0

    def complete(self, work: int) -> None:
        """Finish all work up to this number."""
        self.completed = max(self.completed, min(work, self.launched))


class FakeDriver:
    """A device without memory. Work is numbered; a fence is the number of the last work before it.

    All streams of the engine are one queue of work; the driver's own stream is another. A page may be
    unmapped only after the caller has seen a fence behind the page's last work pass, even if the work happens
    to be complete earlier. A page may be read only by a stream that waits for its zeroing, or after the
    caller has seen the zeroing complete.
    """

    name = "fake"
    granularity_bytes = 64
    max_mappings = 1 << 20

    def __init__(self, capacity_bytes: int, patience: int | None = None) -> None:
        """`patience`: how often passed() returns False before a fence passes; None: until complete()."""
        self.capacity_bytes = capacity_bytes
        self.table = HandleTable()
        self.patience = patience
        self.engine, self.own = Line(), Line()
        self.creates = 0
        self.follows = 0
        self.closed = False
        self._numbers = itertools.count(1)
        self._used_by: dict[int, int] = {}  # address -> number of the engine's last work that touches it
        self._zeroed_by: dict[int, int] = {}  # address -> number of the driver's work that zeroes it
        self._followed: dict[int, int] = {}  # stream -> number of the driver's work that it waits for
        self._gates: list[tuple[int, int]] = []  # (waiting work of the engine, driver's work before it)
        self._asked = 0

    @property
    def launched(self) -> int:
        """Number of the engine's last work."""
        return self.engine.launched

    @property
    def completed(self) -> int:
        """Number of the engine's last work that is complete."""
        return self.engine.completed

    def launch(self, offsets: Iterable[int] | None = None, stream: int = 0) -> None:
        """Start work that touches the pages at `offsets` in the reserved range (None: all mapped pages)."""
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
        """Finish the engine's work up to this number, and the zeroing that it waits for."""
        self.engine.complete(work)
        self.own.complete(self._waited_for(self.engine.completed))

    def complete_own(self, work: int) -> None:
        """Finish zeroing up to this number."""
        self.own.complete(work)

    def held_bytes(self) -> int:
        """Return the bytes of all live handles."""
        return sum(self.table.sizes.values())

    def identity(self) -> DeviceIdentity:
        """Return a made-up identity."""
        return DeviceIdentity("FAKE-0", "fake")

    def memory(self) -> MemoryInfo:
        """Return the free and total bytes."""
        return MemoryInfo(max(0, self.capacity_bytes - self.held_bytes()), self.capacity_bytes)

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses that are never reused."""
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
        """Check that the handle may be cleaned."""
        self.table.check_releasable(handle)

    def release(self, handle: int) -> None:
        """Free a handle."""
        self.table.check_releasable(handle)
        self.table.released(handle)

    def map(self, address: int, page_bytes: int, handles: Sequence[int], stream: int = 0) -> None:
        """Map pages; zeroing them is work on the stream."""
        line, work = (self.own, self._zeroed_by) if stream == OWN_STREAM else (self.engine, self._used_by)
        self.table.check_mappable(address, page_bytes, handles, exclusive=True)
        line.launched += 1
        for page, handle in side_by_side(address, page_bytes, handles):
            self.table.mapped(page, page_bytes, handle)
            work[page] = line.launched

    def alias(self, address: int, size_bytes: int, handle: int) -> None:
        """Map a handle at a second address."""
        self.table.check_mappable(address, size_bytes, [handle], exclusive=False)
        self.table.mapped(address, size_bytes, handle)

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Unmap pages, and check invariant I6: no work that touches them may still run."""
        pages = self.table.unmappable(address, page_bytes, count)
        for page in pages:
            if self._used_by.get(page, 0) > self.engine.seen or self._zeroed_by.get(page, 0) > self.own.seen:
                raise InvariantError("I6: a page was unmapped while work that touches it may be running")
        for page in pages:
            self.table.unmapped(page)
            self._used_by.pop(page, None)
            self._zeroed_by.pop(page, None)

    def tensor(self, address: int, size_bytes: int) -> Any:
        """Return the address and the size, so that a test sees the range."""
        return (address, size_bytes)

    def record(self, stream: int) -> FakeFence:
        """Return a fence behind the stream's work so far."""
        own = stream == OWN_STREAM
        return FakeFence(own, (self.own if own else self.engine).launched)

    def passed(self, fence: FakeFence) -> bool:
        """Return whether the work before a fence is complete."""
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
        """Return the driver's own stream, which the engine does not use."""
        return OWN_STREAM

    def follow(self, stream: int, fence: FakeFence) -> None:
        """Make later work of an engine's stream wait for a fence of the driver's own stream."""
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
        """Return the number of the driver's last work that the engine's work up to `work` waits for."""
        return max((own for at, own in self._gates if at <= work), default=0)
