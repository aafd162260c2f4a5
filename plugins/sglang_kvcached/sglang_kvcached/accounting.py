"""The page pools of a process as the governor counts them: ledger granules, and ledger blocks of equal size.

Units of this plugin, from small to large:

- slot: the KV cache of one token, SGLang's unit;
- page: `page_size` slots, the unit that SGLang's allocators hand out;
- granule: the pages of one pool that are mapped together, one physical page in every buffer of the pool;
- ledger granule: the unit that the ledger leases. A granule of a pool is `ledger_granules_each` of them;
- ledger block: the unit in which the ledger shows usage: a page, or with two pools a divisor of both pages.

A physical page is one allocation handle of the driver; `Geometry.page_bytes` is its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvcached_core.errors import InvariantError
from kvcached_core.scheduler.mapped_set import PlanChange
from sglang_kvcached.page_pool import MappedGranule, PagePool
from sglang_kvcached.prefix_cache_view import PrefixCacheView


class JointChanges:
    """The plan changes of several page pools as one: granules of the second follow those of the first."""

    def __init__(self, page_pools: Sequence[PagePool]) -> None:
        self._page_pools = page_pools

    @property
    def changed(self) -> bool:
        """Say whether `take_change` would return anything."""
        return any(page_pool.mapped_set.changed for page_pool in self._page_pools)

    @property
    def gives_back(self) -> bool:
        """Say whether the next change unmaps anything."""
        return any(page_pool.mapped_set.gives_back for page_pool in self._page_pools)

    def take_change(self) -> PlanChange:
        """Return the granules that were mapped and unmapped since the last call."""
        unmap: list[int] = []
        mapped: list[int] = []
        base = 0
        for page_pool in self._page_pools:
            change = page_pool.mapped_set.take_change()
            unmap += (base + granule for granule in change.unmap)
            mapped += (base + granule for granule in change.map)
            base += page_pool.mapped_set.count
        return PlanChange(tuple(unmap), tuple(mapped))


class PoolAccounting:
    """Counts used, cached and free memory of all page pools, and gives up granules for the governor.

    Properties named after granules or blocks count the ledger's; `pages` has a number for each pool.
    """

    def __init__(
        self,
        page_pools: Sequence[PagePool],
        prefix_cache: PrefixCacheView,
        block_bytes: int,
        granule_bytes: int,
    ) -> None:
        """`block_bytes` and `granule_bytes` are the sizes that the ledger was told.

        Raises InvariantError unless a page of every pool is a whole number of ledger blocks.
        """
        self.page_pools = page_pools
        self.mapped_set = JointChanges(page_pools)
        self.budget = 1
        self._prefix_cache = prefix_cache
        page_sizes = [p.geometry.stride_bytes * len(p.geometry.starts) for p in page_pools]
        if any(size % block_bytes for size in page_sizes):
            raise InvariantError(f"pages of {page_sizes} bytes are no whole blocks of {block_bytes} bytes")
        self._blocks = [size // block_bytes for size in page_sizes]
        self.blocks_of_every_pool = sum(self._blocks)  # ledger blocks of one page of every pool
        self.granule_bytes = granule_bytes
        self.blocks_per_granule = granule_bytes // block_bytes
        self.granule_count = sum(p.mapped_set.count * p.ledger_granules_each for p in page_pools)
        self.set_budget(self.mapped)

    @property
    def mapped(self) -> int:
        """Granules that are mapped."""
        return sum(page_pool.mapped_ledger_granules for page_pool in self.page_pools)

    @property
    def least(self) -> int:
        """Granules that are never given up: the first granule of every pool."""
        return sum(page_pool.ledger_granules_each for page_pool in self.page_pools)

    @property
    def empty(self) -> int:
        """Mapped granules known to be empty."""
        return sum(page_pool.empty * page_pool.ledger_granules_each for page_pool in self.page_pools)

    @property
    def busy(self) -> int:
        """Mapped granules that stay in use until requests end: neither empty nor filled by cached pages.

        An estimate: cached pages may share granules with used pages, which shows only after their eviction.
        """
        kept = 0
        for page_pool in self.page_pools:
            each = page_pool.ledger_granules_each
            reclaimable = page_pool.empty + page_pool.cached_pages // page_pool.geometry.blocks_per_granule
            kept += max(each, page_pool.mapped_ledger_granules - reclaimable * each)
        return kept

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, and page 0 of every pool."""
        return self.blocks_of(1 + pool.owned - pool.cached_pages for pool in self.page_pools)

    @property
    def cached_blocks(self) -> int:
        """Blocks that only the prefix cache keeps."""
        return self.blocks_of(page_pool.cached_pages for page_pool in self.page_pools)

    @property
    def stranded_blocks(self) -> int:
        """Free blocks in granules that are not known to be empty."""
        return self.blocks_of(
            max(0, p.free - p.empty * p.geometry.blocks_per_granule) for p in self.page_pools
        )

    @property
    def may_have_empty(self) -> bool:
        """Say whether a pool has enough free pages for one more empty granule than is known."""
        return any(p.free >= (1 + p.empty) * p.geometry.blocks_per_granule for p in self.page_pools)

    def granules_for(self, pages: Sequence[int]) -> int:
        """Return how many granules, empty or newly mapped, these further pages of each pool need."""
        granules = 0
        for page_pool, count in zip(self.page_pools, pages, strict=True):
            size, each = page_pool.geometry.blocks_per_granule, page_pool.ledger_granules_each
            stranded = max(0, page_pool.free - page_pool.empty * size)
            filled = -(-max(0, count - stranded) // size) * each
            new = page_pool.ledger_granules_towards(count - page_pool.free)
            granules += max(filled, new + page_pool.empty * each if new else 0)
        return granules

    def granules_with(self, pages: Sequence[int]) -> int:
        """Return how many granules must be mapped so that these pages of each pool can be taken.

        Counts no granule as unmapped in exchange: an empty granule of one pool does not help another pool.
        """
        return self.mapped + sum(
            page_pool.ledger_granules_towards(count - page_pool.free)
            for page_pool, count in zip(self.page_pools, pages, strict=True)
        )

    def of_every_pool(self, pages: int) -> list[int]:
        """Return the same number of pages for each pool."""
        return [pages] * len(self.page_pools)

    def blocks_of(self, pages: Iterable[int]) -> int:
        """Return pages of each pool in blocks."""
        return sum(count * blocks for count, blocks in zip(pages, self._blocks, strict=True))

    # -- pages that may be taken -------------------------------------------------------------------------

    def set_budget(self, granules: int) -> None:
        """Set how many granules may be mapped; between steps only."""
        self.budget = max(self.least, min(granules, self.granule_count))

    @property
    def spare(self) -> int:
        """Granules that may be mapped now."""
        return max(0, self.budget - self.mapped)

    def available_pages(self, index: int) -> int:
        """Return the free pages of pool number `index`, plus the pages that the rest of the budget adds."""
        page_pool = self.page_pools[index]
        return page_pool.free + page_pool.addable_pages(self.spare)

    def missing_pages(self, pages: Sequence[int]) -> list[int]:
        """Return how many of these pages each pool lacks within the budget.

        The rest of the budget goes to the first pool first.
        """
        left, missing = self.spare, []
        for page_pool, count in zip(self.page_pools, pages, strict=True):
            lacking = max(0, count - page_pool.free)
            missing.append(max(0, lacking - page_pool.addable_pages(left)))
            left -= page_pool.ledger_granules_for(lacking) or 0
        return missing

    def pages_to_evict(self, pages: Sequence[int]) -> list[int]:
        """Return the pages of each pool to evict so that these pages can be taken; all 0 if that cannot help.

        If the pools that lack pages have none cached, the other pools evict: that leaves budget to the first.
        """
        missing = self.missing_pages(pages)
        helps = [lacks and pool.cached_pages for pool, lacks in zip(self.page_pools, missing, strict=True)]
        if any(helps) or not any(missing):
            return missing
        wanted = zip(self.page_pools, pages, strict=True)
        return [min(pool.cached_pages, max(0, count - pool.free)) for pool, count in wanted]

    def map_pages(self, index: int, pages: int) -> list[MappedGranule]:
        """Map granules of pool number `index` until it has `pages` more, within the budget."""
        return self.page_pools[index].map_pages(pages, self.spare)

    # -- giving up ---------------------------------------------------------------------------------------

    def expire(self, now: float, seconds: float, report_evicted: Callable[[Any], None]) -> float | None:
        """Evict nothing: SGLang's prefix cache has no ages, and an age limit is refused at the start."""
        return None

    def shrink(self, granules: int, report_evicted: Callable[[Any], None]) -> None:
        """Unmap until at most `granules` are mapped or every granule left has a page that a request holds.

        Unmaps empty granules first, from the highest down. Then evicts cached pages, oldest first, which may
        lie in any granule. `report_evicted` gets a range as long as the number of evicted pages.
        """
        factor = 1
        while True:
            self._unmap_empty(granules)
            over = self.mapped - max(self.least, granules)
            if over <= 0 or not any(page_pool.cached_pages for page_pool in self.page_pools):
                return
            freed = self._prefix_cache.evict([self._eviction(pool, over, factor) for pool in self.page_pools])
            if not freed:
                return
            report_evicted(range(freed))
            factor *= 2

    def _unmap_empty(self, granules: int) -> None:
        for page_pool in reversed(self.page_pools):
            over = self.mapped - max(self.least, granules)
            if over > 0 and page_pool.may_find_empty:
                victims = page_pool.find_empty()[-over // page_pool.ledger_granules_each :]
                if victims:
                    page_pool.unmap(victims)

    @staticmethod
    def _eviction(page_pool: PagePool, over: int, factor: int) -> int:
        """Return how many pages to evict for `over` granules: `factor` times the pages of these granules.

        The oldest cached pages are probably spread over all granules, so the factor doubles with each try.
        """
        granules = -(-over // page_pool.ledger_granules_each)
        return min(granules * page_pool.geometry.blocks_per_granule * factor, page_pool.cached_pages)

    def find_empty(self) -> None:
        """Find out which granules are empty; waits for the device."""
        for page_pool in self.page_pools:
            page_pool.find_empty()

    def check(self) -> None:
        """Raise InvariantError unless the page pools add up."""
        for page_pool in self.page_pools:
            page_pool.check()
            if not 0 <= page_pool.cached_pages <= page_pool.owned:
                raise InvariantError(f"{page_pool.cached_pages} pages are cached of {page_pool.owned} owned")
