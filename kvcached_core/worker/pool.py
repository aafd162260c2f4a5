"""The elastic pool of one rank: a tensor whose granules plans map and unmap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvcached_core.driver.base import Driver, Handle
from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.gil import short_waits
from kvcached_core.plan import Plan
from kvcached_core.worker.arena import wait_passed
from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.background_mapping import BackgroundMapping
from kvcached_core.worker.deferred_unmap import DeferredUnmap
from kvcached_core.worker.handle_growth import HandleGrowth
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.handle_source import HandleSource
from kvcached_core.worker.lease_account import LeaseAccount, MappingStats
from kvcached_core.worker.plan_runner import PlanRunner
from kvcached_core.worker.pool_lock import PoolLock
from kvcached_core.worker.pool_sleep import PoolSleep
from kvcached_core.worker.pool_stats import PoolStats
from kvcached_core.worker.premapped import Premapped
from kvcached_core.worker.supply_thread import SupplyThread
from kvcached_core.worker.supply_turn import StatsPublisher, SupplyTurn

if TYPE_CHECKING:
    import torch

ROW_PAGES = 8  # mapped in one call: a step waits for at most one such call, 0.3 ms on a GPU


class ElasticPool:
    """One rank's KV memory. The step's thread calls apply(); the supply thread does the rest."""

    def __init__(
        self,
        driver: Driver,
        geometry: Geometry,
        account: LeaseAccount,
        size_bytes: int | None = None,
        private_bytes: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        pages_per_ledger_granule: int | None = None,
    ) -> None:
        """Reserve addresses and map granule 0. The pool owns the driver from now on.

        `size_bytes` is the tensor's length (default: to the end of the last segment). A pool of several
        arenas needs `pages_per_ledger_granule`, which must divide the pages of each arena's granule
        (default: all pages of the one arena's granule). Raises CapacityError if not even one granule can be
        had; then nothing is left behind.
        """
        self._driver = driver
        self._account = account
        self._closed = False
        self._lock = PoolLock()
        self._make_parts(geometry, pages_per_ledger_granule, clock)
        self.tensor = self.add(geometry, size_bytes)
        publisher = StatsPublisher(account, self.mapping_stats, private_bytes)
        turn = SupplyTurn(account, self._handles, self._growth, self.background, publisher)
        self.supply_thread = SupplyThread(account, turn, clock)
        self.sleep = PoolSleep(
            driver, self._arenas, self._handles, self.supply_thread, self._plans.unmap_later,
            self._lock.after_steps, clock,
        )  # fmt: skip

    def _make_parts(self, geometry: Geometry, pages: int | None, clock: Callable[[], float]) -> None:
        driver, account, lock = self._driver, self._account, self._lock
        row_granules = max(1, ROW_PAGES // len(geometry.starts))
        pages_per_ledger_granule = pages or len(geometry.starts)
        handles = HandlePool(driver, geometry.page_bytes, pages_per_ledger_granule, account, lock.changed)
        arenas = Arenas(driver, geometry.page_bytes, pages_per_ledger_granule, clock)
        # With several arenas nothing is premapped: the scheduler's next granule may be in any of them.
        vacant = (1, geometry.granule_count) if pages is None else (0, 0)
        premapped = Premapped(driver, arenas, *vacant)
        deferred = DeferredUnmap(driver, arenas, premapped.vacated)
        source = HandleSource(handles, deferred, premapped, arenas, lock.changed, clock)
        self._handles, self._arenas, self._premapped, self._deferred = handles, arenas, premapped, deferred
        self._growth = HandleGrowth(driver, account, handles)
        self._plans = PlanRunner(handles, arenas, premapped, deferred, source, row_granules)
        self.background = BackgroundMapping(handles, arenas, premapped, deferred, lock, row_granules)

    def add(self, geometry: Geometry, size_bytes: int | None = None) -> torch.Tensor:
        """Reserve another arena, map its first granule and return its tensor; before start().

        Its granules are numbered after those of the other arenas. Raises CapacityError; then nothing has
        changed.
        """
        with ExitStack() as undo:
            first = self._arenas.add(geometry, size_bytes)
            undo.callback(self._arenas.drop_last)
            handles: list[Handle] = []
            undo.callback(self._return_first, handles)
            for _ in range(self._arenas.ledger_granules(first)):
                handles += self._handles.take_first()
            self._arenas.map(first, [tuple(handles)], 0)
            undo.callback(self._unmap_first, first)
            self._driver.synchronize()
            tensor = self._arenas.tensor()
            undo.pop_all()
        return tensor

    def start(self) -> None:
        """Start the supply thread."""
        self.supply_thread.start()

    def begin_warm_up(self) -> None:
        """Let kernels touch any block: scratch memory is put behind all granules that are not mapped."""
        with self._lock.changed:
            self._driver.synchronize()
            while handles := self._premapped.withdraw():  # else kernels would write to them
                self._handles.spare.extend(handles)
            self._arenas.alias_all()

    def end_warm_up(self) -> None:
        """Make unmapped memory fault again; waits for the device."""
        self._driver.synchronize()
        with self._lock.changed:
            self._arenas.unalias()

    def apply(self, plan: Plan | None, stream: int = 0, also: Iterable[int] = ()) -> None:
        """Carry out a plan before its step's kernels are launched on `stream`.

        `also` names other streams that may still use pages of earlier steps. A plan that was carried out
        before is ignored. Raises InvariantError for a plan that is not legal, before anything changes. After
        any other error the same plan may be applied again.
        """
        if plan is None:
            return
        self.supply_thread.raise_failure()
        handles = self._handles
        if handles.asleep:
            raise InvariantError(f"{plan} came while the pool sleeps")
        with short_waits(), self._lock.step_first, self._lock.changed:
            if not self._plans.is_new(plan):
                return
            self._plans.run(plan, (stream, *also))
            needs_turn = (
                bool(self._deferred)
                or handles.released < handles.release_target
                or bool(plan.map and handles.spare)
            )
        if needs_turn:
            self.supply_thread.wake()

    @property
    def is_at_work(self) -> bool:
        """Say whether the supply thread makes or gives back memory now; cheap, from any thread."""
        return self.supply_thread.is_at_work

    def mapped_bytes(self) -> int:
        """Return the mapped bytes, granules that wait for a fence included."""
        return self._arenas.mapped_ledger_granules * self._account.granule_bytes

    def mapping_stats(self) -> MappingStats:
        """Return the counts that observers read in the ledger."""
        arenas = self._arenas
        return MappingStats(self.mapped_bytes(), arenas.maps, arenas.unmaps, arenas.map_times.words())

    def stats(self) -> PoolStats:
        """Return the granules by state, all read at the same moment."""
        with self._lock.changed:
            handles, premapped = self._handles, len(self._premapped)
            deferred = sum(map(self._arenas.ledger_granules, self._deferred.granules()))
            return PoolStats(
                mapped=self._arenas.mapped_ledger_granules - deferred - premapped,
                deferred=deferred,
                premapped=premapped,
                spare=len(handles.spare),
                moving=handles.cleaning + handles.freeing,
                created=handles.created,
                released=handles.released,
            )

    def check(self) -> None:
        """Raise InvariantError if the pool's counts contradict each other."""
        stats = self.stats()
        mapped, ready, leased = self.mapped_bytes(), self._account.ready_bytes, self._account.leased_bytes
        with self._lock.changed:
            mapped_now = self._arenas.mapped.keys()
            deferred, premapped = self._deferred.granules(), self._premapped.granules()
            pages = [h for handles in (*self._arenas.mapped.values(), *self._handles.spare) for h in handles]
            firsts_live = all(map(self._plans.is_live, self._arenas.firsts))
            facts = {
                "created - released = sum of states": stats.created - stats.released == stats.held,
                "I2: mapped <= ready <= leased": self._closed or mapped <= ready <= leased,
                "I7: granule 0 is mapped": self._closed or firsts_live,
                "deferred granules are mapped": deferred <= mapped_now,
                "premapped granules are mapped and not deferred": premapped <= mapped_now - deferred,
                "a handle is in one place": len(pages) == len(set(pages)),
            }
        broken = [fact for fact, holds in facts.items() if not holds]
        if broken:
            raise InvariantError(f"{'; '.join(broken)}: {stats}, {mapped} <= {ready} <= {leased}")

    def close(self) -> None:
        """Give everything back, the driver included; the tensor must not be used after. May be repeated.

        Continues after a failure, so that no memory is kept, and raises the last one.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as steps:  # from the last to the first
            steps.callback(self._handles.give_back_all)
            steps.callback(self._driver.close)
            steps.callback(self._arenas.close)
            steps.callback(self._handles.close)
            steps.callback(self._unmap_all)
            steps.callback(self._arenas.unalias)
            steps.callback(self._driver.synchronize)
            steps.callback(self.supply_thread.stop)

    def _unmap_all(self) -> None:
        with ExitStack() as steps:
            for granule in list(self._arenas.mapped):
                steps.callback(self._unmap_at_close, granule)

    def _unmap_at_close(self, granule: int) -> None:
        self._deferred.cancel(granule)
        self._premapped.forget(granule)
        (handles,) = self._arenas.unmap(granule)
        self._handles.spare.extend(self._arenas.split(handles))

    def _unmap_first(self, granule: int) -> None:
        # Its zeroing may still run, even if waiting for the whole device failed.
        wait_passed(self._driver, self._driver.record(0))
        self._arenas.unmap(granule)

    def _return_first(self, handles: list[Handle]) -> None:
        self._handles.free_first(self._arenas.split(tuple(handles)))
