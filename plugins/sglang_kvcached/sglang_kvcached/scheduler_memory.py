"""A rank's memory budget for its scheduler, set between two steps and while no request runs.

A budget step goes one way: SchedulerMemory -> PageGovernor -> PoolAccounting -> PrefixCacheView.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcached_core.errors import InvariantError
from kvcached_core.worker.pool_stats import PoolStats
from sglang_kvcached.accounting import PoolAccounting
from sglang_kvcached.counters import Counters
from sglang_kvcached.demand import Demand
from sglang_kvcached.page_governor import PageGovernor
from sglang_kvcached.page_pool import MappedGranule
from sglang_kvcached.prefix_cache_view import PrefixCacheView
from sglang_kvcached.rank_memory import RankMemory
from sglang_kvcached.rank_sync import LedgerReading, RankSync
from sglang_kvcached.wake import Waker

_LONGEST_SEARCH_SECONDS = 60.0  # between two searches for empty granules while requests run


class SchedulerMemory:
    """The budget of a rank. Only the thread of SGLang's scheduler calls it.

    The budget changes in `settle`, `settle_idle`, `wait_for_pages` and `note_flush` only, which every rank
    calls alike. In between, the pages that may be taken change only as pages are taken and freed.
    """

    def __init__(
        self,
        rank_memory: RankMemory,
        demand: Demand,
        prefix_cache: PrefixCacheView,
        rank_sync: RankSync,
        waker: Waker | None = None,
        counters: Counters | None = None,
        streams: Callable[[], tuple[int, tuple[int, ...]]] = lambda: (0, ()),
    ) -> None:
        """`waker` is None except on rank 0, which reads the ledger.

        `streams` returns the stream of the next step's kernels, and the others that may still use pages of
        earlier steps.
        """
        settings = rank_memory.settings
        self.demand = demand
        self.prefix_cache = prefix_cache
        self.counters = counters or Counters()
        self._rank_memory = rank_memory
        self._rank_sync = rank_sync
        self._waker = waker
        self._streams = streams
        self._refused_pages: Sequence[int] | None = None  # of each pool: a refused request needs them
        self._grant_seconds = settings.grant_seconds
        self._search_seconds = self._idle_seconds = settings.idle_seconds
        self._search_at = float("-inf")  # when to search for empty granules again
        self.accounting = PoolAccounting(
            rank_memory.page_pools, prefix_cache, rank_memory.block_bytes, rank_memory.account.granule_bytes
        )
        virtual_bytes = self.accounting.granule_count * self.accounting.granule_bytes
        spare = settings.spare.units_of(virtual_bytes, self.accounting.granule_bytes)
        self.governor = PageGovernor(
            self.accounting, rank_sync, spare, settings.idle_seconds, self.counters.report,
            demand.remaining_pages,
        )  # fmt: skip
        self._pages_moved = True  # since the last search for empty granules
        self._idle_reading = rank_sync.reading
        self.settle_idle()

    # -- between two steps -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Set the budget of the next step and ask the ledger for missing memory."""
        self._pause_for_supply_thread()
        self._rank_sync.sync(idle=False)
        self._update(True)

    def settle_idle(self) -> list[str]:
        """Set the budget of a scheduler without requests; return a sentence for each inconsistency.

        Cheap if nothing has happened, because SGLang's loop spins.
        """
        self._pause_for_supply_thread()
        has_rung = self._waker is not None and self._waker.take_ring()
        if self._rank_sync.is_single and not (has_rung or self._pages_moved):
            return []
        is_new = self._rank_sync.sync(idle=True)
        if not self._pages_moved and not (is_new and self._idle_update_is_due()):
            return []
        self._update(False)
        self._idle_reading = self._rank_sync.reading
        return self._violations()

    def wait_for_pages(self, pages: Sequence[int]) -> None:
        """Ask for the memory of these pages of each pool, and wait briefly if it is on its way.

        Gives up no memory, so pages that were attainable before are still attainable. Memory of later steps
        is created while this step runs.
        """
        governor = self.governor
        enough = governor.want_at_least(pages)
        # Also above a target: running requests may go on until the ledger refuses memory.
        if enough > governor.held and not self._rank_sync.refused():
            self._rank_sync.wait(
                enough + governor.released, self._grant_seconds, self._burst_memory_is_coming
            )
            governor.refresh()

    def _burst_memory_is_coming(self) -> bool:
        """Say whether memory for the rest of a burst's first step is being created.

        Waiting for all of it costs less than computing while the supply thread competes for Python's lock.
        """
        return self._rank_memory.pool.is_at_work and not self.demand.is_computing

    def note_flush(self) -> None:
        """Note that SGLang cleared its pools: all but the first granules is surplus from now on.

        The surplus is kept like other idle memory, so requests after a flush start at once.
        """
        self._rank_sync.sync(idle=True)
        self._pages_moved = False  # every granule is known to be empty
        self._update(False)

    def map_pages(self, index: int, pages: int) -> list[MappedGranule]:
        """Map granules of pool number `index` until it has `pages` more, within the budget.

        `apply_plan` makes their memory usable.
        """
        return self.accounting.map_pages(index, pages)

    def apply_plan(self) -> None:
        """Map and unmap the granules that changed; kernels launched after this see the memory."""
        if self.governor.has_plan:
            plan = self.governor.take_plan()
            if plan is not None:
                self._rank_memory.apply(plan, *self._streams())

    def note_pages_moved(self) -> None:
        """Note that pages were taken or freed."""
        self._pages_moved = True

    def note_refused(self, pages: Sequence[int]) -> None:
        """Note that a request was refused, and the pages of each pool that it needs in all."""
        self._refused_pages = pages

    def forget_refused(self) -> None:
        """Forget the refused request: SGLang looks at its queue now and will refuse it again if it must."""
        self._refused_pages = None

    # -- memory that requests may get --------------------------------------------------------------------

    @property
    def must_retract(self) -> bool:
        """Say whether SGLang must retract requests: for a lower limit, or for another engine's floor."""
        governor = self.governor
        if self.accounting.mapped > max(self.accounting.least, governor.limit):
            return True
        return governor.must_preempt_to(self._rank_sync.now) is not None

    @property
    def must_bytes(self) -> int:
        """The bytes to which this engine must shrink for another engine's floor; 0 if it need not shrink."""
        return self.governor.must * self.accounting.granule_bytes

    @property
    def may_admit(self) -> bool:
        """Say whether a request may begin: not while the engine holds more than its limit or target.

        If nothing runs, a request may begin all the same: no other request could end and free memory.
        """
        return not (self.must_retract or self.governor.over_target) or not self.demand.running

    def attainable_pages(self, index: int) -> int:
        """Return the pages of pool number `index` that requests would have if all attainable memory came."""
        accounting = self.accounting
        most = self.governor.attainable_blocks // accounting.blocks_per_granule
        page_pool = accounting.page_pools[index]
        addable = page_pool.addable_pages(max(accounting.spare, most - accounting.mapped))
        return page_pool.free + page_pool.cached_pages + addable

    def limit_pages(self, index: int) -> int:
        """Return the pages of pool number `index` that requests could hold if they had the whole limit."""
        accounting, page_pool = self.accounting, self.accounting.page_pools[index]
        each = page_pool.ledger_granules_each
        others = accounting.least - each
        granules = min(page_pool.mapped_set.count, max(1, (self.governor.limit - others) // each))
        return min(page_pool.page_count, granules * page_pool.geometry.blocks_per_granule - 1)

    # -- checks ------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """Return the pool's counts."""
        return self._rank_memory.pool.stats()

    def _violations(self) -> list[str]:
        try:
            self.check()
        except InvariantError as error:
            return [f"kvcached: {error}"]
        return []

    def check(self) -> None:
        """Raise InvariantError if pages, granules, budget, pool or account do not add up."""
        self.governor.check()
        self._rank_memory.check()
        mapped, known = self._rank_memory.pool.stats().mapped, self.accounting.mapped
        if mapped != known:
            raise InvariantError(f"{mapped} granules are mapped, and the scheduler counts {known}")

    def close(self) -> None:
        """Stop the waker. A second call does nothing."""
        if self._waker is not None:
            self._waker.close()

    # -- parts -------------------------------------------------------------------------------------------

    def _pause_for_supply_thread(self) -> None:
        """Pause while memory is created or given back, if the pause delays no running request.

        SGLang's loop spins while no request runs. Each driver call of the supply thread releases Python's
        lock, and a spinning loop would then keep the lock for a millisecond.
        """
        if self._rank_memory.pool.is_at_work and not self.demand.running:
            self._rank_sync.pause()

    def _update(self, busy: bool) -> None:
        now, accounting = self._rank_sync.now, self.accounting
        self.counters.write(busy, now, self.prefix_cache.evicted_pages)
        self.prefix_cache.count()
        self._find_empty(now, busy)
        growing = self.demand.growth_pages() if busy else 0
        pages = self.demand.next_pages() if busy else 0
        deadline = self.governor.deadline
        self.governor.update(
            now,
            accounting.blocks_of(accounting.of_every_pool(pages)),
            busy,
            accounting.blocks_of(accounting.of_every_pool(growing)),
        )
        self.apply_plan()
        self._clear_batch_is_full()
        if self._waker is not None and self.governor.deadline not in (None, deadline):
            self._waker.read_deadline_again()

    def _find_empty(self, now: float, busy: bool) -> None:
        """Search for empty granules when requests have ended, and from time to time while requests run."""
        if busy and (now < self._search_at or not self.accounting.may_have_empty):
            return
        if not self._pages_moved:
            return
        self.accounting.find_empty()
        self._pages_moved = busy
        if self.accounting.empty:
            self._search_seconds = self._idle_seconds
        else:
            self._search_seconds = min(_LONGEST_SEARCH_SECONDS, 2 * self._search_seconds)
        self._search_at = now + self._search_seconds

    def _clear_batch_is_full(self) -> None:
        """Clear SGLang's `batch_is_full` once the refused request fits; SGLang does so when a request ends.

        Repeated in every step until SGLang looks at its queue: it may be about to replace the batch.
        """
        if self._refused_pages is not None and self.may_admit:
            pools = range(len(self.accounting.page_pools))
            if all(self.attainable_pages(index) >= self._refused_pages[index] for index in pools):
                self.demand.clear_batch_is_full()

    def _idle_update_is_due(self) -> bool:
        """Say whether an idle scheduler has to act on the new reading, or its deadline has passed."""
        if _without_time(self._rank_sync.reading) != _without_time(self._idle_reading):
            return True
        return self.governor.deadline is not None and self._rank_sync.now >= self.governor.deadline


def _without_time(reading: LedgerReading) -> LedgerReading:
    return reading._replace(now_us=0, calls=0)
