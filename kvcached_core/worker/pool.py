"""What a worker uses: an elastic tensor whose granules a plan maps and unmaps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from kvcached_core.driver.base import Driver, Handle
from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.gil import short_waits
from kvcached_core.plan import Plan
from kvcached_core.worker.arena import wait_passed
from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.deferred_unmap import DeferredUnmap
from kvcached_core.worker.handle_pool import SLICE_GRANULES, HandlePool
from kvcached_core.worker.handle_source import HandleSource
from kvcached_core.worker.lease_account import LeaseAccount, MappingStats
from kvcached_core.worker.pool_sleep import PoolSleep
from kvcached_core.worker.pool_stats import PoolStats
from kvcached_core.worker.premapped import Premapped
from kvcached_core.worker.supply_thread import SupplyThread

if TYPE_CHECKING:
    import torch

MAX_PREMAPPED_GRANULES = 128  # more than a step maps: to map beyond it would keep others from their memory
ROW_PAGES = 8  # in one call: a step waits for as many at most, 0.3 ms on a GPU


class ElasticPool:
    """One rank's KV memory. The step thread calls apply(); a thread of its own does the rest."""

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
        """Reserve addresses and map granule 0. The driver is the pool's from now on.

        `size_bytes` is the tensor's length (default: to the end of the last segment). A pool of several
        arenas needs `pages_per_ledger_granule`, which must divide the pages of each arena's granule (default:
        all pages of the one arena's granule).
        Raises CapacityError if not even one granule can be had; then nothing is left behind.
        """
        self._driver = driver
        self._geometry = geometry
        # Guards what follows, and the supply's counters. Never held across create, clean or release,
        # nor while a fence is waited for.
        self._changed = threading.Condition(threading.Lock())
        # Taken before `changed`: by a step for all of apply(), by the supply thread until it has `changed`.
        # So a step waits for one granule at most, and nothing is mapped ahead while a step waits for handles.
        self._step_first = threading.Lock()
        self._next_sequence = 0
        self._attempted = -1  # the sequence of a plan that failed half-way
        self._closed = False
        self._account = account
        pages = pages_per_ledger_granule or len(geometry.starts)
        self._row = max(1, ROW_PAGES // len(geometry.starts))  # granules
        self._handles = HandlePool(driver, geometry.page_bytes, pages, account, self._changed)
        self._arenas = Arenas(driver, geometry.page_bytes, pages, clock)
        # Where the scheduler goes next is known of one arena only.
        vacant = (1, geometry.granule_count) if pages_per_ledger_granule is None else (0, 0)
        self._premapped = Premapped(driver, self._arenas, *vacant)
        self._deferred = DeferredUnmap(driver, self._arenas, self._premapped.vacated)
        self._handle_source = HandleSource(
            self._handles, self._deferred, self._premapped, self._arenas, self._changed, clock
        )
        self.tensor = self.add(geometry, size_bytes)
        self.supply_thread = SupplyThread(
            account, self._handles, self.unmap_deferred, self.premap, self.usage, private_bytes, clock
        )
        self.sleep = PoolSleep(
            driver,
            self._arenas,
            self._handles,
            self.supply_thread,
            self._unmap_later,
            self._after_steps,
            clock,
        )

    def add(self, geometry: Geometry, size_bytes: int | None = None) -> torch.Tensor:
        """Reserve another arena, map its first granule and return its tensor; before start().

        Its granules are numbered after those of the others. Raises CapacityError; then nothing has changed.
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
        """Let kernels touch any block: scratch memory is behind all that is not mapped."""
        with self._changed:
            self._driver.synchronize()
            while handles := self._premapped.withdraw():  # else kernels would write to them
                self._handles.spare.extend(handles)
            self._arenas.alias_all()

    def end_warm_up(self) -> None:
        """Make unmapped memory fault again; waits for the device."""
        self._driver.synchronize()
        with self._changed:
            self._arenas.unalias()

    def apply(self, plan: Plan | None, stream: int = 0, also: Iterable[int] = ()) -> None:
        """Carry out a plan before its step's kernels are launched on `stream`.

        `also` names other streams that may still use pages of earlier steps. A plan that was applied
        is ignored. Raises InvariantError for one that is not legal, before anything changes. After any
        other error the same plan may be applied again: granules to unmap may be on their way, and
        none that it maps is left mapped.
        """
        if plan is None:
            return
        self.supply_thread.raise_failure()
        if self._handles.asleep:
            raise InvariantError(f"{plan} came while the pool sleeps")
        with short_waits(), self._step_first, self._changed:
            if not self._is_next(plan):
                return
            self._attempted = plan.sequence
            streams = (stream, *also)
            if plan.unmap:
                self._unmap_later(plan.unmap, streams)
            self._map(plan.map, streams)
            self._handles.ordered = max(self._handles.ordered, plan.released)
            self._next_sequence = plan.sequence + 1
            needs_turn = (
                bool(self._deferred)
                or self._handles.released < self._handles.ordered
                or bool(plan.map and self._handles.spare)
            )
        if needs_turn:
            self.supply_thread.wake()

    def unmap_deferred(self) -> int:
        """Unmap a slice, oldest first, of what no kernel can touch any more; return how many are left."""
        waiting = done = 0
        while done < SLICE_GRANULES:
            with self._after_steps():
                is_short = self._handles.owed > len(self._handles.spare) + self._handles.cleaning
                withdrawn = self._deferred.withdraw(self._row) or (
                    self._premapped.withdraw() if is_short else []
                )
                waiting = len(self._deferred) + (len(self._premapped) if is_short else 0)
                if not withdrawn:
                    break
                parts = [part for handles in withdrawn for part in self._arenas.split(handles)]
                self._handles.cleaning += len(parts)
            self._handles.put(parts, clean=not is_short)  # what is to be freed need not be clean
            done += len(withdrawn)
        return waiting

    def premap(self) -> bool:
        """Map spare handles where the next plans are likely to want them: lowest granules first.

        Off the step path, which then finds its granules mapped. The lock is held for one row at a time, no
        longer than the step would need to map it itself. Returns whether there may be more to map.
        Raises what the driver raises; no handle is lost then.
        """
        if not self._handles.settled:
            return False  # I2: what the ledger does not know to be ready is not mapped
        placed = 0
        while placed < SLICE_GRANULES:
            with self._after_steps():
                most = min(self._row, MAX_PREMAPPED_GRANULES - len(self._premapped), len(self._handles.spare))
                row = self._premapped.vacant_row(most)
                if not row or self._handles.owed or self._handles.asleep or self._arenas.is_warming_up:
                    return False
                granules = self._handles.take(len(row))
                try:
                    self._premapped.place(row.start, granules)
                except BaseException:
                    if row.start not in self._premapped:
                        self._handles.spare.extendleft(reversed(granules))
                    raise
            placed += len(row)
        return True

    @property
    def is_at_work(self) -> bool:
        """Say whether memory is being made or given back just now; cheap, from any thread."""
        return self.supply_thread.is_at_work

    def mapped_bytes(self) -> int:
        """Return what is mapped, waiting for a fence included."""
        return self._arenas.mapped_ledger_granules * self._account.granule_bytes

    def usage(self) -> MappingStats:
        """Return what observers are told."""
        arena = self._arenas
        return MappingStats(self.mapped_bytes(), arena.maps, arena.unmaps, arena.map_times.words())

    def stats(self) -> PoolStats:
        """Return counts that belong together."""
        with self._changed:
            pool, premapped = self._handles, len(self._premapped)
            deferred = sum(map(self._arenas.ledger_granules, self._deferred.granules()))
            return PoolStats(
                mapped=self._arenas.mapped_ledger_granules - deferred - premapped,
                deferred=deferred,
                premapped=premapped,
                spare=len(pool.spare),
                moving=pool.cleaning + pool.leaving,
                created=pool.created,
                released=pool.released,
            )

    def check(self) -> None:
        """Raise InvariantError if the pool's books do not add up."""
        stats = self.stats()
        mapped, ready, leased = self.mapped_bytes(), self._account.ready_bytes, self._account.leased_bytes
        with self._changed:
            mapped_now = self._arenas.mapped.keys()
            deferred, premapped = self._deferred.granules(), self._premapped.granules()
            pages = [h for handles in (*self._arenas.mapped.values(), *self._handles.spare) for h in handles]
            facts = {
                "created - released = sum of states": stats.created - stats.released == stats.held,
                "I2: mapped <= ready <= leased": self._closed or mapped <= ready <= leased,
                "I7: granule 0 is mapped": self._closed or all(map(self._is_live, self._arenas.firsts)),
                "granules to be unmapped are mapped": deferred <= mapped_now,
                "premapped granules are mapped and not to be unmapped": premapped <= mapped_now - deferred,
                "a handle is in one place": len(pages) == len(set(pages)),
            }
        broken = [fact for fact, holds in facts.items() if not holds]
        if broken:
            raise InvariantError(f"{'; '.join(broken)}: {stats}, {mapped} <= {ready} <= {leased}")

    def close(self) -> None:
        """Give everything back, the driver included; the tensor must not be used after. May be repeated.

        Goes on after a failure, so that no memory is kept, and raises the last one.
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

    def _is_live(self, granule: int) -> bool:
        return (
            granule in self._arenas.mapped
            and granule not in self._deferred
            and granule not in self._premapped
        )

    def _is_next(self, plan: Plan) -> bool:
        """Say whether a plan is new; raise InvariantError unless it is legal."""
        if plan.sequence < self._next_sequence:
            return False
        if plan.sequence > self._next_sequence:
            raise InvariantError(f"plan {plan.sequence} came, {self._next_sequence} was expected")
        again = plan.sequence == self._attempted
        firsts, count = self._arenas.firsts, self._arenas.count
        bad_unmap = [g for g in plan.unmap if g in firsts or not (self._is_live(g) or again)]
        bad_map = [g for g in plan.map if not 0 <= g < count or self._is_live(g)]
        twice = len({*plan.unmap, *plan.map}) < len(plan.unmap) + len(plan.map)
        if bad_unmap or bad_map or twice:
            raise InvariantError(f"{plan} is not legal: unmap {bad_unmap}, map {bad_map} of {count} granules")
        return True

    @contextmanager
    def _after_steps(self) -> Iterator[None]:
        """Hold `changed`; a step that waits for it goes first."""
        with self._step_first:
            self._changed.acquire()
        try:
            yield
        finally:
            self._changed.release()

    def _map(self, granules: Sequence[int], streams: Sequence[int]) -> None:
        """Make granules ordinary ones, all or none, in which later work on the first stream reads zeros.

        Also the others may still use pages of earlier steps.
        """
        with ExitStack() as undo:
            # What is mapped already comes first: its handles are not to be taken for the others.
            # A canceled unmap leaves finite old values, as in a block that was used before.
            revived = [granule for granule in granules if self._deferred.cancel(granule)]
            if revived:
                undo.callback(self._unmap_later, revived, streams)
            claimed = self._premapped.claim(granules, streams[0])
            if claimed:
                undo.callback(self._unmap_later, claimed, streams)
            there = {*revived, *claimed}
            missing = [granule for granule in granules if granule not in there]
            while missing:
                count = self._arenas.row(missing, self._row)
                self._handle_source.map(missing[0], count, streams[0])
                undo.callback(self._unmap_later, missing[:count], streams)
                del missing[:count]
            undo.pop_all()

    def _unmap_later(self, granules: Iterable[int], streams: Iterable[int]) -> None:
        self._deferred.add([granule for granule in granules if self._is_live(granule)], streams)

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
        # Its zeroing may be running still, even where waiting for the whole device failed.
        wait_passed(self._driver, self._driver.record(0))
        self._arenas.unmap(granule)

    def _return_first(self, handles: list[Handle]) -> None:
        self._handles.free_first(self._arenas.split(tuple(handles)))
