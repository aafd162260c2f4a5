"""One reserved address range, the tensor over it, and the mapping of pages in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvcached_core.driver.base import Driver, Fence, Handle, side_by_side
from kvcached_core.errors import DriverError, InvariantError
from kvcached_core.geometry import Geometry

if TYPE_CHECKING:
    import torch

Handles = tuple[Handle, ...]  # one per segment: the memory of one granule

FENCE_BOUND_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 20e-6, 1e-3


def wait_passed(driver: Driver, fence: Fence, pause: Callable[[float], object] = time.sleep) -> None:
    """Wait until a fence has passed. Raises DriverError when that takes more than a minute."""
    seconds, waited = _FIRST_PAUSE_SECONDS, 0.0
    while not driver.passed(fence):
        if waited >= FENCE_BOUND_SECONDS:
            raise DriverError("wait for a fence", -1, f"not passed after {FENCE_BOUND_SECONDS:g} s")
        pause(seconds)
        waited += seconds
        seconds = min(2 * seconds, _LAST_PAUSE_SECONDS)


class Arena:
    """Maps granules, each whole or not at all. The caller holds the pool's lock.

    Granules are numbered through all arenas of a rank; those of this arena begin at `first`.
    """

    def __init__(
        self, driver: Driver, geometry: Geometry, size_bytes: int, first: int, mapped: dict[int, Handles]
    ) -> None:
        """Reserve addresses for `size_bytes`; nothing is mapped yet.

        `mapped` has the handles of the mapped granules of all arenas; this arena keeps its own in it.
        Raises InvariantError if the granules do not fit into `size_bytes`.
        """
        self._driver = driver
        self._geometry = geometry
        self._size_bytes = size_bytes
        granularity = driver.granularity_bytes
        self._reserved_bytes = -(-size_bytes // granularity) * granularity
        end = max(geometry.starts) + geometry.granule_count * geometry.page_bytes
        if end > self._reserved_bytes:
            raise InvariantError(f"granules end at {end} bytes, past the arena's {self._reserved_bytes}")
        self._base = driver.reserve(self._reserved_bytes)
        self._first = first
        self._mapped = mapped
        self._scratch: dict[int, Handle] = {}  # page size -> handle, while warming up
        self._aliases: dict[int, int] = {}  # address -> size

    @property
    def is_warming_up(self) -> bool:
        """Say whether scratch memory is behind the granules that are not mapped."""
        return bool(self._aliases)

    def tensor(self) -> torch.Tensor:
        """Return the int8 tensor over all `size_bytes`; its first granule must be mapped."""
        return self._driver.tensor(self._base, self._size_bytes)

    def map(self, first: int, granules: Sequence[Handles], stream: int) -> None:
        """Map a row of granules, all or none; later work on `stream` reads zeros in them.

        `granules` are the handles of granule `first`, of the next one and so on. Raises InvariantError if one
        of them is mapped already or the arena is warming up, and what the driver raises.
        """
        page, row = self._geometry.page_bytes, range(first, first + len(granules))
        if self._aliases or not self._mapped.keys().isdisjoint(row):
            raise InvariantError(f"one of {row} is mapped already, or the arena is warming up")
        with ExitStack() as undo:
            segments = zip(*granules, strict=True)  # the pages of one segment are one row of pages
            for offset, handles in zip(self._geometry.ranges(first - self._first), segments, strict=True):
                self._driver.map(self._base + offset, page, handles, stream)
                undo.callback(self._take_back, self._base + offset, len(handles), stream)
            undo.pop_all()
        self._mapped.update(zip(row, granules, strict=True))

    def unmap(self, first: int, count: int) -> list[Handles]:
        """Unmap a row of granules, all or none, and return their handles; no kernel may use them any more."""
        page, row = self._geometry.page_bytes, range(first, first + count)
        granules = [self._mapped[granule] for granule in row]
        with ExitStack() as undo:
            for offset, handles in zip(
                self._geometry.ranges(first - self._first), zip(*granules, strict=True), strict=True
            ):
                self._driver.unmap(self._base + offset, page, count)
                undo.callback(self._put_back, self._base + offset, handles)
            undo.pop_all()
        for granule in row:
            del self._mapped[granule]
        return granules

    def alias_all(self) -> None:
        """Put scratch memory behind all granules that are not mapped, so that warm-up may touch any block."""
        with ExitStack() as undo:
            undo.callback(self.unalias)
            for address, size in list(self._unmapped()):
                if size not in self._scratch:
                    self._scratch[size] = self._driver.create(size)
                self._driver.alias(address, size, self._scratch[size])
                self._aliases[address] = size
            undo.pop_all()

    def unalias(self) -> None:
        """Unmap the scratch memory and free it; the device is idle. May be repeated."""
        while self._aliases:
            address, size = next(reversed(self._aliases.items()))
            self._driver.unmap(address, size)
            del self._aliases[address]
        while self._scratch:
            size, handle = next(iter(self._scratch.items()))
            self._driver.release(handle)
            del self._scratch[size]

    def close(self) -> None:
        """Return the addresses; everything must be unmapped and the tensor unused from now on."""
        self._driver.unreserve(self._base, self._reserved_bytes)

    def _take_back(self, address: int, count: int, stream: int) -> None:
        # The driver may have queued the zeroing of these pages on the stream: unmap them after it.
        wait_passed(self._driver, self._driver.record(stream))
        self._driver.unmap(address, self._geometry.page_bytes, count)

    def _put_back(self, address: int, handles: Handles) -> None:
        for page, handle in side_by_side(address, self._geometry.page_bytes, handles):
            self._driver.alias(page, self._geometry.page_bytes, handle)

    def _unmapped(self) -> Iterator[tuple[int, int]]:
        """Yield (address, size) of every page that is not mapped, and of the gaps between segments."""
        geometry, page, end = self._geometry, self._geometry.page_bytes, 0
        for start in sorted(geometry.starts):
            if start > end:
                yield self._base + end, start - end
            for granule in range(geometry.granule_count):
                if self._first + granule not in self._mapped:
                    yield self._base + start + granule * page, page
            end = start + geometry.granule_count * page
        if self._reserved_bytes > end:
            yield self._base + end, self._reserved_bytes - end
