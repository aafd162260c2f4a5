"""The pages of one SGLang pool in granules: which granules are mapped, and which of them are empty.

Units are defined in accounting.py. SGLang keeps its free list on the device. A step only needs its length,
which the host knows; only a search for empty granules reads the list and waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.scheduler.mapped_set import MappedSet


class FreeList(Protocol):
    """An allocator's list of the free pages in mapped granules."""

    def free_count(self) -> int:
        """Return how many free pages there are; does not wait for the device."""

    def free_tensor(self) -> torch.Tensor:
        """Return all free pages in one int64 tensor."""

    def set_free(self, pages: torch.Tensor) -> None:
        """Replace the list by `pages`."""


class MappedGranule(NamedTuple):
    """A granule that was just mapped, and its pages [first, end)."""

    granule: int
    first: int
    end: int


class PagePool:
    """Pages 1 <= p <= `page_count` of one pool; padding tokens write to page 0.

    Pages of mapped granules are listed: listed = free + owned, where requests and the prefix cache own pages.
    """

    def __init__(self, geometry: Geometry, page_count: int, ledger_granules_each: int = 1) -> None:
        """`ledger_granules_each` is the number of ledger granules in a granule of this pool."""
        self.geometry = geometry
        self.page_count = page_count
        self.ledger_granules_each = ledger_granules_each
        self.mapped_set = MappedSet(geometry.granule_count)
        self.owner: FreeList | None = None
        self.cached_pages = 0  # owned pages that only the prefix cache keeps; set by PrefixCacheView
        self.listed = 0
        # The empty granules of the last search; since that search, pages taken, and whether pages were freed.
        self._empty = self._taken = 0
        self._freed = True
        self._page_range = [self._pages_of(g) for g in range(geometry.granule_count)]
        self._partial = [
            g
            for g, (first, end) in enumerate(self._page_range)
            if g and end - first < self._pages_per_granule
        ]
        self.mapped_set.map_lowest()
        self.mapped_set.take_change()  # granule 0 is mapped before the first plan (I7)
        self.listed = self._page_count_of(0)

    @property
    def _pages_per_granule(self) -> int:
        return self.geometry.blocks_per_granule

    def _pages_of(self, granule: int) -> tuple[int, int]:
        blocks = self.geometry.blocks(granule)
        first, end = max(1, blocks.start), min(blocks.stop, self.page_count + 1)
        return first, max(first, end)

    def _page_count_of(self, granule: int) -> int:
        first, end = self._page_range[granule]
        return end - first

    @property
    def _free_list(self) -> FreeList:
        if self.owner is None:
            raise InvariantError("an elastic pool has no elastic allocator")
        return self.owner

    # -- counts ------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Free pages of mapped granules."""
        return self._free_list.free_count()

    @property
    def owned(self) -> int:
        """Pages that requests and the prefix cache hold."""
        return self.listed - self.free

    @property
    def unlisted(self) -> int:
        """Free pages without memory: in no mapped granule, or across the boundary of two physical pages."""
        return self.page_count - self.listed

    @property
    def mapped_ledger_granules(self) -> int:
        """Ledger granules that are mapped in this pool."""
        return self.mapped_set.mapped * self.ledger_granules_each

    @property
    def empty(self) -> int:
        """Mapped granules that are certainly empty: a lower bound.

        The last search sorted the free list, and freed pages are added before or after the sorted part. Since
        then pages are taken in order, so one empty granule is used up before the next is touched.
        """
        return max(
            0, self._empty - -(-self._taken // self._pages_per_granule) - bool(self._partial and self._taken)
        )

    def addable_pages(self, ledger_granules: int) -> int:
        """Return the pages that this many further ledger granules would add."""
        vacant = self.mapped_set.count - self.mapped_set.mapped
        more = min(vacant, max(0, ledger_granules) // self.ledger_granules_each)
        pages = more * self._pages_per_granule
        if more == vacant:  # this includes the granules with fewer pages
            mapped = set(self.mapped_set.granules()) if self._partial else set()
            pages -= sum(
                self._pages_per_granule - self._page_count_of(g) for g in self._partial if g not in mapped
            )
        return pages

    def unlisted_pages(self, device: object) -> list[torch.Tensor]:
        """Return the pages that are in no mapped granule; looks at all pages."""
        listed = torch.zeros(self.page_count + 1, dtype=torch.bool)
        listed[0] = True
        for granule in self.mapped_set.granules():
            listed[slice(*self._page_range[granule])] = True
        return [torch.nonzero(~listed).flatten().to(device)]

    def ledger_granules_for(self, pages: int) -> int | None:
        """Return the ledger granules that add at least this many pages; None if the pool has fewer pages."""
        if pages <= 0:
            return 0
        more = -(-pages // self._pages_per_granule)
        for granules in (more, more + 1):
            if self.addable_pages(granules * self.ledger_granules_each) >= pages:
                is_vacant = granules <= self.mapped_set.count - self.mapped_set.mapped
                return granules * self.ledger_granules_each if is_vacant else None
        return None

    def ledger_granules_towards(self, pages: int) -> int:
        """Like `ledger_granules_for`, but return all unmapped ledger granules if the pool has fewer pages."""
        granules = self.ledger_granules_for(pages)
        vacant = self.mapped_set.count - self.mapped_set.mapped
        return vacant * self.ledger_granules_each if granules is None else granules

    # -- mapping and unmapping ---------------------------------------------------------------------------

    def map_pages(self, pages: int, ledger_granules: int) -> list[MappedGranule]:
        """Map the lowest vacant granules until this many pages are added; at most `ledger_granules`."""
        each, mapped = self.ledger_granules_each, list[MappedGranule]()
        while pages > 0 and ledger_granules >= each and self.mapped_set.mapped < self.mapped_set.count:
            granule = self.mapped_set.map_lowest()
            first, end = self._page_range[granule]
            mapped.append(MappedGranule(granule, first, end))
            self._freed = True
            self.listed += end - first
            pages -= end - first
            ledger_granules -= each
        return mapped

    def note_taken(self, pages: int) -> None:
        """Note that this many free pages were taken."""
        self._taken += pages

    def note_freed(self) -> None:
        """Note that pages were freed."""
        self._freed = True

    @property
    def may_find_empty(self) -> bool:
        """Say whether a search could find an empty granule."""
        return self.free >= self._pages_per_granule and (self._freed or self.empty > 0)

    def find_empty(self) -> list[int]:
        """Sort the free list and return the empty granules, lowest first; waits for the device.

        Granule 0 is never given up and never returned.
        """
        free, mapped = torch.sort(self._free_list.free_tensor()).values, self.mapped_set.granules()
        self._free_list.set_free(free)
        counts = torch.bincount(self._granules_of(free), minlength=self.mapped_set.count).tolist()
        empty = [g for g in mapped if g and counts[g] == self._page_count_of(g)]
        self._empty, self._taken, self._freed = len(empty), 0, False
        return empty

    def unmap(self, granules: list[int]) -> None:
        """Remove granules that `find_empty` just returned from the free list, and unmap them."""
        free = self._free_list.free_tensor()
        gone = torch.zeros(self.mapped_set.count, dtype=torch.bool)
        gone[granules] = True
        gone = gone.to(free.device)
        kept = free[~gone[self._granules_of(free)]]
        pages = sum(self._page_count_of(g) for g in granules)
        if len(kept) != len(free) - pages:
            raise InvariantError(
                f"{len(free) - len(kept)} of the {pages} pages of granules {granules} were free"
            )
        self._free_list.set_free(kept)
        for granule in granules:
            self.mapped_set.unmap(granule)
        self.listed -= pages
        self._empty -= len(granules)

    def free_all(self) -> None:
        """Put every page of the mapped granules into the free list, after SGLang cleared the pool."""
        pages = [torch.arange(*self._page_range[g], dtype=torch.int64) for g in self.mapped_set.granules()]
        self._free_list.set_free(torch.cat(pages).to(self._free_list.free_tensor().device))
        self._empty, self._taken, self._freed, self.cached_pages = self.mapped_set.mapped - 1, 0, False, 0

    def _granules_of(self, pages: torch.Tensor) -> torch.Tensor:
        # As Geometry.granule_of, on the device.
        return pages * self.geometry.stride_bytes // self.geometry.page_bytes

    def check(self) -> None:
        """Raise InvariantError unless every free page has memory and is listed once; looks at all pages."""
        self.mapped_set.check()
        free, mapped = sorted(self._free_list.free_tensor().tolist()), self.mapped_set.granules()
        expected = {page for g in mapped for page in range(*self._page_range[g])}
        wrong = {
            "free twice": len(free) != len(set(free)),
            "free without memory": not expected.issuperset(free),
            "listed": self.listed != len(expected),
            "free": self.free != len(free),
            "granule 0 is mapped": 0 not in mapped,
        }
        if any(wrong.values()):
            raise InvariantError(f"free pages do not add up: {[name for name in wrong if wrong[name]]}")
