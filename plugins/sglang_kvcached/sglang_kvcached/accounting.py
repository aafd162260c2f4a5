"""All pools of a process in the words of the governor: granules of the ledger, and blocks of equal size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvcached_core.errors import InvariantError
from kvcached_core.scheduler.mapped_set import Change
from sglang_kvcached.page_pool import Opened, PagePool


class JointChanges:
    """The extents of several sheets as one: granules of the second are numbered after those of the first."""

    def __init__(self, sheets: Sequence[PagePool]) -> None:
        self._sheets = sheets

    @property
    def changed(self) -> bool:
        """Say whether `take_change` would return anything."""
        return any(sheet.extent.changed for sheet in self._sheets)

    @property
    def gives_back(self) -> bool:
        """Say whether the next change unmaps anything."""
        return any(sheet.extent.gives_back for sheet in self._sheets)

    def take_change(self) -> Change:
        """Return what changed since the last call."""
        unmap: list[int] = []
        mapped: list[int] = []
        base = 0
        for sheet in self._sheets:
            change = sheet.extent.take_change()
            unmap += (base + granule for granule in change.unmap)
            mapped += (base + granule for granule in change.map)
            base += sheet.extent.count
        return Change(tuple(unmap), tuple(mapped))


class PoolAccounting:
    """Who uses what of the sheets. `evict` turns cached pages into free ones: it is told how many pages of
    each sheet are wanted and returns how many were freed.

    Sizes are those that the ledger was told; a page of every sheet is a whole number of blocks.
    """

    def __init__(
        self,
        sheets: Sequence[PagePool],
        evict: Callable[[list[int]], int],
        block_bytes: int,
        granule_bytes: int,
    ) -> None:
        self.sheets = sheets
        self.extent = JointChanges(sheets)
        self.budget = 1
        self._evict = evict
        page_bytes = [s.geometry.stride_bytes * len(s.geometry.starts) for s in sheets]
        self._blocks = [size // block_bytes for size in page_bytes]
        if any(size % block_bytes for size in page_bytes):
            raise InvariantError(f"pages of {page_bytes} bytes are no whole blocks of {block_bytes} bytes")
        self.granule_bytes = granule_bytes
        self.blocks_per_granule = granule_bytes // block_bytes
        self.granule_count = sum(s.extent.count * s.units for s in sheets)
        self.set_budget(self.mapped)

    @property
    def mapped(self) -> int:
        """Granules that are mapped."""
        return sum(sheet.mapped_units for sheet in self.sheets)

    @property
    def least(self) -> int:
        """Granules that are never given up: the first of every sheet."""
        return sum(sheet.units for sheet in self.sheets)

    @property
    def empty(self) -> int:
        """Mapped granules known to be empty."""
        return sum(sheet.empty * sheet.units for sheet in self.sheets)

    @property
    def busy(self) -> int:
        """Mapped granules that are not a loan: without those that are empty or that cached pages fill.

        Cached pages may lie among used ones: who has to give up more finds out by evicting them all.
        """
        kept = 0
        for sheet in self.sheets:
            lent = sheet.empty + sheet.cached_pages // sheet.geometry.blocks_per_granule
            kept += max(sheet.units, sheet.mapped_units - lent * sheet.units)
        return kept

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, and page 0 of every sheet."""
        return self._sum(1 + sheet.owned - sheet.cached_pages for sheet in self.sheets)

    @property
    def cached_blocks(self) -> int:
        """Blocks that only the prefix cache keeps."""
        return self._sum(sheet.cached_pages for sheet in self.sheets)

    @property
    def stranded_blocks(self) -> int:
        """Free blocks in granules that are not known to be empty."""
        return self._sum(max(0, s.free - s.empty * s.geometry.blocks_per_granule) for s in self.sheets)

    @property
    def may_be_empty(self) -> bool:
        """Say whether there are enough free pages for a granule to be empty that is not known to be."""
        return any(s.free >= (1 + s.empty) * s.geometry.blocks_per_granule for s in self.sheets)

    def granules_for(self, pages: Sequence[int]) -> int:
        """Return how many granules of the ledger, empty or new ones, so many pages of each sheet take."""
        granules = 0
        for sheet, count in zip(self.sheets, pages, strict=True):
            size, units = sheet.geometry.blocks_per_granule, sheet.units
            kept = max(0, sheet.free - sheet.empty * size)
            opened = -(-max(0, count - kept) // size) * units
            new = sheet.units_towards(count - sheet.free)
            granules += max(opened, new + sheet.empty * units if new else 0)
        return granules

    def granules_with(self, pages: Sequence[int]) -> int:
        """Return how many granules are mapped once so many pages of each sheet can be taken, if nothing is
        given up: what is empty in one sheet is of no use to another.
        """
        lacking = zip(self.sheets, pages, strict=True)
        return self.mapped + sum(sheet.units_towards(count - sheet.free) for sheet, count in lacking)

    def blocks_of(self, pages: Sequence[int]) -> int:
        """Return pages of each sheet in blocks."""
        return self._sum(pages)

    def _sum(self, pages: Any) -> int:
        return sum(count * blocks for count, blocks in zip(pages, self._blocks, strict=True))

    # -- what may be taken -------------------------------------------------------------------------------

    def set_budget(self, granules: int) -> None:
        """Set how many granules may be mapped; between steps only."""
        self.budget = max(self.least, min(granules, self.granule_count))

    @property
    def spare(self) -> int:
        """Granules that may be mapped now."""
        return max(0, self.budget - self.mapped)

    def attainable(self, at: int) -> int:
        """Return the free pages of a sheet, and those it could have with all that is left of the budget."""
        sheet = self.sheets[at]
        return sheet.free + sheet.room(self.spare)

    def short(self, pages: Sequence[int], granules: int | None = None) -> list[int]:
        """Return what is missing of each sheet to take so many pages of each.

        The first sheet is served first, from the rest of the budget or from as many granules as are given.
        """
        left, missing = self.spare if granules is None else granules, []
        for sheet, count in zip(self.sheets, pages, strict=True):
            lacking = max(0, count - sheet.free)
            missing.append(max(0, lacking - sheet.room(left)))
            left -= sheet.units_for(lacking) or 0
        return missing

    def to_evict(self, pages: Sequence[int]) -> list[int]:
        """Return the pages of each sheet whose eviction helps to take so many of each; all 0 if nothing does.

        Where those that are short have none, what others lack and have cached: it leaves them the budget.
        """
        short = self.short(pages)
        helps = [missing and sheet.cached_pages for sheet, missing in zip(self.sheets, short, strict=True)]
        if any(helps) or not any(short):
            return short
        lacking = zip(self.sheets, pages, strict=True)
        return [min(sheet.cached_pages, max(0, count - sheet.free)) for sheet, count in lacking]

    def open(self, at: int, pages: int) -> list[Opened]:
        """Map granules of a sheet until it has `pages` more, within the budget."""
        return self.sheets[at].open(pages, self.spare)

    # -- giving up ---------------------------------------------------------------------------------------

    def expire(self, now: float, seconds: float, evict: Callable[[Any], None]) -> float | None:
        """Evict nothing: SGLang's tree does not tell how old a page is, and an age limit is refused."""
        return None

    def shrink(self, granules: int, evict: Callable[[Any], None]) -> None:
        """Unmap until at most `granules` are mapped or all that are left hold a page that is not evictable.

        Empty granules go first, the highest before the others. Then the prefix cache is evicted, which gives
        its oldest pages wherever they are.
        """
        asked = 1
        while True:
            self._close_empty(granules)
            over = self.mapped - max(self.least, granules)
            if over <= 0 or not any(sheet.cached_pages for sheet in self.sheets):
                return
            freed = self._evict([self._share_to_evict(sheet, over, asked) for sheet in self.sheets])
            if not freed:
                return
            evict(range(freed))
            asked *= 2

    def _close_empty(self, granules: int) -> None:
        for sheet in reversed(self.sheets):
            over = self.mapped - max(self.least, granules)
            if over > 0 and sheet.is_worth_a_census:
                victims = sheet.census()[-over // sheet.units :]
                if victims:
                    sheet.close(victims)

    @staticmethod
    def _share_to_evict(sheet: PagePool, over: int, asked: int) -> int:
        """Return the pages to evict: a share of the cache is likely to be all over the granules."""
        pages = -(-over // sheet.units) * sheet.geometry.blocks_per_granule * asked
        return min(pages, sheet.cached_pages)

    def look(self) -> None:
        """Find out which granules are empty; waits for the device."""
        for sheet in self.sheets:
            sheet.census()

    def check(self) -> None:
        """Raise InvariantError unless the sheets add up and no more is mapped than may be."""
        for sheet in self.sheets:
            sheet.check()
            if not 0 <= sheet.cached_pages <= sheet.owned:
                raise InvariantError(f"{sheet.cached_pages} pages are cached of {sheet.owned} owned")
