"""Settles a rank's memory between the steps of its scheduler, and while there are none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from kvcached_core.errors import InvariantError
from kvcached_core.ledger import SchedulerView
from kvcached_core.worker.pool_stats import PoolStats
from sglang_kvcached.accounting import PoolAccounting
from sglang_kvcached.counters import Counters
from sglang_kvcached.demand import Demand
from sglang_kvcached.page_governor import PageGovernor
from sglang_kvcached.page_pool import Opened
from sglang_kvcached.prefix_cache_view import PrefixCacheView
from sglang_kvcached.rank_memory import RankMemory
from sglang_kvcached.rank_sync import DistributedRanks, RankGroup, RankSync, SingleRank
from sglang_kvcached.wake import Waker


class SchedulerMemory:
    """The budget of a rank. One thread calls it, SGLang's scheduler.

    The budget changes in `settle`, `idle`, `wait` and `flushed` only, which every rank calls alike. Between
    two of those what may be taken moves by what is taken and freed.
    """

    def __init__(
        self,
        rank: RankMemory,
        demand: Demand,
        tree: PrefixCacheView,
        agreement: RankSync,
        waker: Waker | None = None,
        tally: Counters | None = None,
        streams: Callable[[], tuple[int, tuple[int, ...]]] = lambda: (0, ()),
    ) -> None:
        """`waker` is for the rank that reads the ledger; `streams` returns where the next step's kernels are
        launched, and what else may still use pages of earlier ones."""
        chosen = rank.settings
        self._rank = rank
        self._demand = demand
        self._tree = tree
        self._agreement = agreement
        self._waker = waker
        self.tally = tally or Counters()
        self._streams = streams
        self._short: Sequence[int] | None = None
        self._grant_seconds = chosen.grant_seconds
        self._look_seconds = self._idle_seconds = chosen.idle_seconds
        self.books = PoolAccounting(rank.sheets, self.evict, rank.block_bytes, rank.account.granule_bytes)
        virtual_bytes = self.books.granule_count * self.books.granule_bytes
        spare = -(-chosen.spare.of(virtual_bytes) // self.books.granule_bytes)
        self.governor = PageGovernor(
            self.books, agreement, lambda _: None, spare, chosen.idle_seconds, self.tally.report,
            lasting=self._lasting,
        )  # fmt: skip
        self._look_at = float("-inf")
        self._dirty = True  # pages moved since the empty granules were last counted
        self._idle_word = agreement.word
        self.idle()

    @classmethod
    def begin(cls, rank: RankMemory, scheduler: Any, start: Any,
              clock: Callable[[], float] = time.monotonic) -> SchedulerMemory:  # fmt: skip
        """Serve a scheduler that is complete; every rank calls this."""
        circle: RankGroup = SingleRank()
        if start.world_size > 1:
            circle = DistributedRanks(start.cpu_group)
            circle.meet()  # all are described now
        rank.account.grow_with(range(start.world_size))
        desk = (
            SchedulerView.find(start.runtime, start.instance, start.world_size, clock)
            if start.rank == 0
            else None
        )
        rank.pool.start()
        agreement = RankSync(desk, circle, bool(scheduler.server_args.sleep_on_idle), clock)
        waker = None if desk is None else Waker(desk, scheduler.idle_sleeper, clock)
        tally = Counters() if desk is None else Counters(desk.count, desk.report)
        service = cls(
            rank, Demand(scheduler), PrefixCacheView(scheduler), agreement, waker, tally, _streams(scheduler)
        )
        if waker is not None:
            waker.start(lambda: service.governor.deadline)
        return service

    # -- between two steps -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Settle the budget for the next step and ask for what is missing."""
        self._make_way()
        self._agreement.call(idle=False)
        self._update(True)

    def idle(self) -> list[str]:
        """Settle the budget of a scheduler without requests, and say what does not add up.

        Cheap where nothing has happened: SGLang's loop spins.
        """
        self._make_way()
        rang = self._waker is not None and self._waker.take()
        if self._agreement.is_alone and not (rang or self._dirty):
            return []
        heard = self._agreement.call(idle=True)
        if not self._dirty and not (heard and self._is_due()):
            return []
        self._update(False)
        self._idle_word = self._agreement.word
        return self._violations()

    def wait(self, pages: Sequence[int]) -> None:
        """Ask for what makes so many pages of each sheet attainable; wait a moment if it is on its way.

        Gives nothing up: pages that were found attainable stay so until they are taken. What later steps take
        comes while this one runs.
        """
        governor = self.governor
        enough = governor.ask(pages)
        # Also over a target: what runs may go on as long as nobody refuses it.
        if enough > governor.held and not self._agreement.refused():
            self._agreement.wait(enough + governor.released, self._grant_seconds, self._is_coming)
            governor.refresh()

    def _is_coming(self) -> bool:
        """Say whether memory for the rest of a burst's first step is being made.

        Waiting for all of it costs less than going on beside the thread that makes it, for Python's lock.
        """
        return self._rank.pool.is_at_work and not self._demand.is_under_way

    def flushed(self) -> None:
        """Take note that the pools were cleared: all but the first granules is surplus from now on.

        It is kept like other idle memory. Whoever flushes to change weights goes on at once.
        """
        self._agreement.call(idle=True)
        self._dirty = False  # all is known to be empty
        self._update(False)

    def open(self, at: int, pages: int) -> list[Opened]:
        """Open granules of a sheet until it has `pages` more, within the budget; carry() maps them."""
        return self.books.open(at, pages)

    def count(self) -> None:
        """Count anew what only the prefix cache keeps."""
        self._tree.count(self.books.sheets)

    def touched(self) -> None:
        """Note that pages were taken or freed."""
        self._dirty = True

    def note_short(self, pages: Sequence[int]) -> None:
        """Note that a request was not admitted which needs so many pages of each sheet in all."""
        self._short = pages

    def looked_at_queue(self) -> None:
        """Note that SGLang asks who may begin: whoever is short of something says so again."""
        self._short = None

    def _admit_again(self) -> None:
        """Open SGLang's door while there is what a request was short of: it opens it when one ends.

        In every step until SGLang has looked: the door is on a batch that SGLang may be about to replace.
        """
        if self._short is not None and self.admits:
            most = range(len(self.books.sheets))
            if all(self.attainable_at_most(at) >= self._short[at] for at in most):
                self._demand.admit_again()

    # -- what may be had ---------------------------------------------------------------------------------

    @property
    def demand(self) -> Demand:
        """What the scheduler's queues say."""
        return self._demand

    @property
    def is_over(self) -> bool:
        """Say whether requests are to be retracted: over a limit, or over what another's floor leaves."""
        governor = self.governor
        if self.books.mapped > max(self.books.least, governor.limit):
            return True
        return governor.must_preempt_to(self._agreement.now) is not None

    @property
    def must_bytes(self) -> int:
        """What is left to this engine for the sake of another's floor; 0 if nobody asks."""
        return self.governor.must * self.books.granule_bytes

    @property
    def admits(self) -> bool:
        """Say whether a request may begin: never while more is held than others leave to this engine.

        Unless nothing runs: nothing would ever end, and what is held may be used.
        """
        return not (self.is_over or self.governor.over_target) or not self._demand.running

    def attainable_at_most(self, at: int) -> int:
        """Return what a sheet would have for requests if all came that this engine could ask for."""
        books = self.books
        most = self.governor.attainable_blocks // books.blocks_per_granule
        sheet = books.sheets[at]
        return sheet.free + sheet.cached_pages + sheet.room(max(books.spare, most - books.mapped))

    def limit_pages(self, at: int) -> int:
        """Return the pages that requests could hold of a sheet if there were nothing else."""
        books, sheet = self.books, self.books.sheets[at]
        others = books.least - sheet.units
        granules = min(sheet.extent.count, max(1, (self.governor.limit - others) // sheet.units))
        return min(sheet.page_count, granules * sheet.geometry.blocks_per_granule - 1)

    # -- watching ----------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """Return the pool's counts."""
        return self._rank.pool.stats()

    def _violations(self) -> list[str]:
        try:
            self.check()
        except InvariantError as error:
            return [f"kvcached: {error}"]
        return []

    def check(self) -> None:
        """Raise InvariantError if pages, granules, budget, pool or account do not add up."""
        self.governor.check()
        self._rank.check()
        mapped, known = self._rank.pool.stats().mapped, self.books.mapped
        if mapped != known:
            raise InvariantError(f"{mapped} granules are mapped, of which the scheduler knows {known}")

    def close(self) -> None:
        """Let the ledger go; may be repeated."""
        if self._waker is not None:
            self._waker.close()

    # -- parts -------------------------------------------------------------------------------------------

    def _make_way(self) -> None:
        """Pause while memory is made or given back and nothing runs that this could hold up.

        SGLang's loop spins then, be it idle or do all requests wait for memory. Each call of the driver gives
        Python's lock away, and a loop that spins keeps it for a millisecond.
        """
        if self._rank.pool.is_at_work and not self._demand.running:
            self._agreement.pause()

    def _update(self, busy: bool) -> None:
        now, demand = self._agreement.now, self._demand
        self.tally.note(busy, now)
        self._tree.count(self.books.sheets)
        self._look(now, busy)
        books, sheets = self.books, len(self.books.sheets)
        growing = demand.growth() if busy else 0
        pages = [demand.pages() if busy else 0] * sheets
        self.governor.asked = pages
        deadline = self.governor.deadline
        self.governor.update(now, books.blocks_of(pages), busy, books.blocks_of([growing] * sheets))
        self.carry()
        self._admit_again()
        if self._waker is not None and self.governor.deadline not in (None, deadline):
            self._waker.tell()

    def _lasting(self) -> int:
        """Return the granules that all requests may still take."""
        return self.books.granules_for([self._demand.lasting()] * len(self.books.sheets))

    def _look(self, now: float, busy: bool) -> None:
        """Count the empty granules: when requests have ended, and now and then while they run."""
        if busy and (now < self._look_at or not self.books.may_be_empty):
            return
        if not self._dirty:
            return
        self.books.look()
        self._dirty = busy
        self._look_seconds = self._idle_seconds if self.books.empty else min(60.0, 2 * self._look_seconds)
        self._look_at = now + self._look_seconds

    def _is_due(self) -> bool:
        """Say whether the news of an idle call call for anything."""
        word, before = self._agreement.word, self._idle_word
        if word._replace(now_us=0, calls=0) != before._replace(now_us=0, calls=0):
            return True
        return self.governor.deadline is not None and self._agreement.now >= self.governor.deadline

    def evict(self, pages: Sequence[int]) -> int:
        """Turn so many cached pages of each sheet into free ones, if there are as many; return how many."""
        freed = self._tree.evict(pages)
        self.tally.evictions += freed
        self._tree.count(self.books.sheets)
        return freed

    def carry(self) -> None:
        """Let the pool do what changed; kernels launched after this see its memory."""
        if self.governor.owes:
            plan = self.governor.take_plan()
            if plan is not None:
                self._rank.apply(plan, *self._streams())


def _streams(scheduler: Any) -> Callable[[], tuple[int, tuple[int, ...]]]:
    """Return the streams of a scheduler: its steps are launched behind the current one's work."""
    import torch

    if torch.device(scheduler.device).type != "cuda":
        return lambda: (0, ())
    others = tuple(int(s.cuda_stream) for s in (scheduler.forward_stream, scheduler.copy_stream))
    return lambda: (int(torch.cuda.current_stream().cuda_stream), others)
