"""The pages of one pool in granules: which are mapped, and which of those can be given up.

SGLang keeps its free list on the device. What a step needs of it here are lengths, which the host knows
without asking the device; only a census looks at the list itself.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.scheduler.mapped_set import MappedSet


class FreeList(Protocol):
    """The free pages of mapped granules, as an allocator keeps them."""

    def free_count(self) -> int:
        """Return how many there are; does not wait for the device."""

    def free_tensor(self) -> torch.Tensor:
        """Return them all in one int64 tensor."""

    def set_free(self, pages: torch.Tensor) -> None:
        """Put others in their place."""


class Opened(NamedTuple):
    """A granule that was mapped, and its pages [first, end)."""

    granule: int
    first: int
    end: int


class PagePool:
    """Pages 1 <= p <= `page_count` of one pool; page 0 takes what padding writes.

    Only pages of mapped granules are in the free list: listed = free + owned, owned being what requests and
    the prefix cache hold. A granule of this pool is `units` granules of the ledger.
    """

    def __init__(self, geometry: Geometry, page_count: int, units: int = 1) -> None:
        self.geometry = geometry
        self.page_count = page_count
        self.units = units
        self.extent = MappedSet(geometry.granule_count)
        self.owner: FreeList | None = None
        self.cached_pages = 0  # of the owned ones, those that only the prefix cache keeps; as last told
        self.listed = 0
        self._empty = 0  # granules that were empty in the last census
        self._taken = 0  # pages taken since
        self._freed = True  # whether pages were freed since, or granules mapped
        self._whole = [self._pages(g) for g in range(geometry.granule_count)]
        self._partial = [g for g, (first, end) in enumerate(self._whole) if g and end - first < self._size]
        self.extent.map_lowest()
        self.extent.take_change()  # granule 0 is mapped before the first plan (I7)
        self.listed = self._count(0)

    @property
    def _size(self) -> int:
        return self.geometry.blocks_per_granule

    def _pages(self, granule: int) -> tuple[int, int]:
        blocks = self.geometry.blocks(granule)
        first, end = max(1, blocks.start), min(blocks.stop, self.page_count + 1)
        return first, max(first, end)

    def _count(self, granule: int) -> int:
        first, end = self._whole[granule]
        return end - first

    @property
    def _list(self) -> FreeList:
        if self.owner is None:
            raise InvariantError("an elastic pool has no elastic allocator")
        return self.owner

    # -- counts ------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Free pages of mapped granules."""
        return self._list.free_count()

    @property
    def owned(self) -> int:
        """Pages that requests and the prefix cache hold."""
        return self.listed - self.free

    @property
    def unlisted(self) -> int:
        """Pages that nobody holds and that have no memory, or never will."""
        return self.page_count - self.listed

    @property
    def mapped_units(self) -> int:
        """Granules of the ledger that are mapped here."""
        return self.extent.mapped * self.units

    @property
    def empty(self) -> int:
        """Mapped granules that are surely empty.

        The census sorts the free list, and what comes back is put before or behind it: pages taken since are
        in order, so one empty granule is used up before the next is begun.
        """
        return max(0, self._empty - -(-self._taken // self._size) - bool(self._partial and self._taken))

    def room(self, units: int) -> int:
        """Return the pages that as many more granules of the ledger would add."""
        vacant = self.extent.count - self.extent.mapped
        more = min(vacant, max(0, units) // self.units)
        pages = more * self._size
        if more == vacant:  # all of them: also those that are not whole
            mapped = set(self.extent.granules()) if self._partial else set()
            pages -= sum(self._size - self._count(g) for g in self._partial if g not in mapped)
        return pages

    def unlisted_pages(self, device: object) -> list[torch.Tensor]:
        """Return the pages that are in no mapped granule; looks at all."""
        listed = torch.zeros(self.page_count + 1, dtype=torch.bool)
        listed[0] = True
        for granule in self.extent.granules():
            listed[slice(*self._whole[granule])] = True
        return [torch.nonzero(~listed).flatten().to(device)]

    def units_for(self, pages: int) -> int | None:
        """Return the granules of the ledger that add so many pages at least; None if there are fewer."""
        if pages <= 0:
            return 0
        more = -(-pages // self._size)
        for granules in (more, more + 1):
            if self.room(granules * self.units) >= pages:
                return granules * self.units if granules <= self.extent.count - self.extent.mapped else None
        return None

    def units_towards(self, pages: int) -> int:
        """Return likewise, or all granules that are left if they have fewer pages."""
        units = self.units_for(pages)
        return (self.extent.count - self.extent.mapped) * self.units if units is None else units

    # -- granules that come and go -----------------------------------------------------------------------

    def open(self, pages: int, units: int) -> list[Opened]:
        """Map the lowest vacant granules until they have so many pages, `units` of the ledger's at most."""
        opened: list[Opened] = []
        while pages > 0 and units >= self.units and self.extent.mapped < self.extent.count:
            granule = self.extent.map_lowest()
            first, end = self._whole[granule]
            opened.append(Opened(granule, first, end))
            self._freed = True
            self.listed += end - first
            pages -= end - first
            units -= self.units
        return opened

    def took(self, pages: int) -> None:
        """Note that so many free pages were taken."""
        self._taken += pages

    def freed(self) -> None:
        """Note that pages were freed."""
        self._freed = True

    @property
    def is_worth_a_census(self) -> bool:
        """Say whether a census could find an empty granule."""
        return self.free >= self._size and (self._freed or self.empty > 0)

    def census(self) -> list[int]:
        """Sort the free list and return the empty granules, the lowest first; waits for the device.

        Granule 0 is never empty.
        """
        free, mapped = torch.sort(self._list.free_tensor()).values, self.extent.granules()
        self._list.set_free(free)
        counts = torch.bincount(self._granules_of(free), minlength=self.extent.count).tolist()
        empty = [g for g in mapped if g and counts[g] == self._count(g)]
        self._empty, self._taken, self._freed = len(empty), 0, False
        return empty

    def close(self, granules: list[int]) -> None:
        """Take granules that a census just found empty out of the free list, and unmap them."""
        free = self._list.free_tensor()
        gone = torch.zeros(self.extent.count, dtype=torch.bool)
        gone[granules] = True
        gone = gone.to(free.device)
        kept = free[~gone[self._granules_of(free)]]
        pages = sum(self._count(g) for g in granules)
        if len(kept) != len(free) - pages:
            raise InvariantError(
                f"{len(free) - len(kept)} of the {pages} pages of granules {granules} were free"
            )
        self._list.set_free(kept)
        for granule in granules:
            self.extent.unmap(granule)
        self.listed -= pages
        self._empty -= len(granules)

    def cleared(self) -> None:
        """Put every page of the mapped granules into the free list: nothing is used any more."""
        pages = [torch.arange(*self._whole[g], dtype=torch.int64) for g in self.extent.granules()]
        self._list.set_free(torch.cat(pages).to(self._list.free_tensor().device))
        self._empty, self._taken, self._freed, self.cached_pages = self.extent.mapped - 1, 0, False, 0

    def _granules_of(self, pages: torch.Tensor) -> torch.Tensor:
        # As Geometry.granule_of, on the device.
        return pages * self.geometry.stride_bytes // self.geometry.page_bytes

    def check(self) -> None:
        """Raise InvariantError unless every free page has memory and is there once; looks at all."""
        self.extent.check()
        free, mapped = sorted(self._list.free_tensor().tolist()), self.extent.granules()
        expected = {page for g in mapped for page in range(*self._whole[g])}
        wrong = {
            "free twice": len(free) != len(set(free)),
            "free without memory": not expected.issuperset(free),
            "listed": self.listed != len(expected),
            "free": self.free != len(free),
            "granule 0 is mapped": 0 not in mapped,
        }
        if any(wrong.values()):
            raise InvariantError(f"free pages do not add up: {[name for name in wrong if wrong[name]]}")
