"""Memory ahead of need: leases become handles, on a thread that no step waits for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

from kvcached_core.driver.base import Driver
from kvcached_core.errors import BusyError, CapacityError, DriverError, InvariantError
from kvcached_core.units import format_size
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.lease_account import LeaseAccount

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.02, 0.2
_TELL_GRANULES = 32  # freed before the ledger is told: it rings those who wait
SLICE_GRANULES = 32  # made in one turn, so that retiring and releasing never wait long
_TELL_HANDLES = 64  # made before a step that waits is told: about a millisecond on a GPU


class HandlePool:
    """The handles of one rank that are not mapped, and the promises behind all of them.

    Invariant, in granules: created - released = mapped + pending + len(spare) + cleaning + leaving,
    of which the pool has the first two. `spare` and the counters are guarded by `changed`, which is
    never held across a driver call here. All but take() is called by one thread at a time.
    """

    def __init__(
        self,
        driver: Driver,
        page_bytes: int,
        segments: int,
        account: LeaseAccount,
        changed: threading.Condition,
    ) -> None:
        """Start with nothing; a granule is `segments` handles of `page_bytes`."""
        if account.granule_bytes != page_bytes * segments:
            raise InvariantError(
                f"granule of the account: {account.granule_bytes}, of the pool: {page_bytes * segments}"
            )
        self._driver = driver
        self._page_bytes = page_bytes
        self._segments = segments
        self._account = account
        self._changed = changed
        self.spare: deque[Handles] = deque()
        self.cleaning = 0  # on their way to spare
        self.created = 0
        self.released = 0
        self.ordered = 0  # released <= ordered, once everything owed has been freed
        self._leaving: list[int] = []  # handles of the one granule that is being freed
        self._untold_created = self._untold_released = self._untold_never_ready = self._untold_withdrawn = 0
        self._demand_bytes = 0
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._retry_at = float("-inf")
        self.growth_ended: DriverError | None = None
        self.asleep = False  # then nothing is wanted

    @property
    def owed(self) -> int:
        """Granules that the scheduler let go or does not count on, and that are neither free nor leaving."""
        return max(0, self.ordered - self.released + self._surplus - self.leaving)

    @property
    def _surplus(self) -> int:
        """Granules that were made and that the scheduler does not count on, as other ranks made fewer."""
        most = self._account.created_most
        return max(0, self.created - max(most, self.released + 1)) if most else 0

    @property
    def leaving(self) -> int:
        """Granules that are neither usable nor free yet: 0 or 1."""
        return 1 if self._leaving else 0

    def take_first(self) -> Handles:
        """Lease and make one granule, here and now. Raises CapacityError with the numbers if refused."""
        unit, memory = self._account.granule_bytes, self._driver.memory()
        if self._account.lease(unit, memory) < unit:
            raise CapacityError(
                f"no room for the first granule of {format_size(unit)}: {format_size(memory.free_bytes)} of "
                f"{format_size(memory.total_bytes)} are free, and the ledger grants no lease of it"
            )
        with ExitStack() as undo:
            undo.callback(self._account.give_back, bytes_never_ready=unit)
            handles = self._make()
            undo.pop_all()
        self.created += 1
        self._untold_created += 1
        self.settle()
        return handles

    def free_first(self, granules: list[Handles]) -> None:
        """Free what take_first() made, and give the promises back."""
        with ExitStack() as steps:
            for handle in (handle for handles in granules for handle in handles):
                steps.callback(self._driver.release, handle)
        self.released += len(granules)
        self._untold_released += len(granules)
        self.settle()

    def take(self, most: int = 1) -> list[Handles]:
        """Return the handles of spare granules, as many as there are; the caller holds `changed`."""
        return [self.spare.popleft() for _ in range(min(most, len(self.spare)))]

    def put(self, granules: Sequence[Handles], clean: bool = True) -> None:
        """Make granules that were counted as cleaning spare again."""
        try:
            for handle in chain.from_iterable(granules) if clean else ():
                self._driver.clean(handle)
        except (CapacityError, DriverError):
            log.exception("cleaning a page failed; it is zeroed when it is mapped")
        with self._changed:
            self.cleaning -= len(granules)
            self.spare.extend(granules)
            self._changed.notify_all()

    def release_owed(self) -> None:
        """Free spare granules until none is owed; the last are to be told of by settle()."""
        while self._choose_leaving():
            while self._leaving:
                self._driver.release(self._leaving[-1])
                with self._changed:
                    self._leaving.pop()
                    if not self._leaving:
                        self._note_freed()
            if self._untold_released + self._untold_withdrawn >= _TELL_GRANULES:
                self.settle()

    def _note_freed(self) -> None:
        if self.released < self.ordered:
            self.released += 1
            self._untold_released += 1
        else:
            self.created -= 1
            self._untold_withdrawn += 1

    def grow(self, now: float, rung: bool) -> float | None:
        """Lease and make what is wanted; return the seconds after which to call again, or None."""
        unit = self._account.granule_bytes
        unmet = self._account.wanted_bytes - self._account.leased_bytes
        if unmet < unit or self.growth_ended or self.asleep:
            self._satisfied()
            return None
        if self._account.created_most:
            return None  # the scheduler lifts it, and rings, once it sees that the surplus is gone
        if now < self._retry_at and not rung:
            return self._retry_at - now
        asked = min(unmet // unit, SLICE_GRANULES)
        try:
            granted = self._account.lease(asked * unit, self._driver.memory())
        except BusyError:
            return self._retry(now)
        except (CapacityError, DriverError) as error:
            self._note_failure(error)
            return self._retry(now)
        self._demand_bytes = unmet - granted  # as the ledger has noted it
        made = self._make_promised(granted // unit)
        # Read again: telling of releases that the ledger was too busy for has lowered the lease.
        unmet = max(0, self._account.wanted_bytes - self._account.leased_bytes)
        if made == asked and unmet < unit:
            self._satisfied()
            return None
        self._demand_bytes = unmet
        if made == asked:
            self._may_retry_at_once()
            return 0.0
        self._tell(self._account.refuse, unmet)
        return None if self.growth_ended else self._retry(now)

    def settle(self) -> None:
        """Tell the ledger what became of promises; if it is busy, the rest waits for the next turn.

        What is not told yet is over-counted there, never under-counted.
        """
        if self._untold_created and self._tell(self._account.created, self._untold_created):
            self._untold_created = 0
        if self._untold_created:
            return
        gone = self._untold_never_ready, self._untold_released, self._untold_withdrawn
        if any(gone) and self._tell(self._account.give_back, *gone):
            self._untold_never_ready = self._untold_released = self._untold_withdrawn = 0

    @property
    def settled(self) -> bool:
        """Say whether the ledger knows all there is to know."""
        gone = self._untold_never_ready or self._untold_released or self._untold_withdrawn
        return not (self._untold_created or gone)

    def recount(self, created: int) -> None:
        """Count as though `created` granules had been made so far; those that were not were freed at once.

        All is settled. Raises InvariantError if more than that were made.
        """
        more = created - self.created
        if more < 0:
            raise InvariantError(f"{self.created} granules were made, not {created}")
        with self._changed:
            self.created += more
            self.released += more
            self.ordered = self.released
        self._account.recount(more)

    def close(self) -> None:
        """Free every handle that is not mapped; go on after a failure and raise the last one."""
        with ExitStack() as steps:
            for handle in [*self._leaving, *(handle for handles in self.spare for handle in handles)]:
                steps.callback(self._driver.release, handle)
            self._leaving.clear()
            self.spare.clear()

    def give_back_all(self) -> None:
        """Return all promises, after the driver has freed all memory."""
        self._untold_released += self.created - self.released
        self.released = self.created
        self.settle()
        if not self.settled:
            log.warning("the ledger was busy: what this owner held is counted until its slot is freed")

    def _choose_leaving(self) -> bool:
        with self._changed:
            if not self._leaving and self.owed and self.spare:
                self._leaving = list(self.spare.popleft())
            return bool(self._leaving)

    def _make_promised(self, promised: int) -> int:
        """Make granules until `promised` exist or one fails; return how many were made.

        The ledger is told of the first, the second, the fourth and so on, up to a millisecond's work: who
        waits for a few has them at once, and much memory costs little of the engine's interpreter.
        """
        made, most = 0, max(1, _TELL_HANDLES // self._segments)
        while made < promised:
            count = min(max(1, made), most, promised - made)
            batch = self._make_batch(count)
            with self._changed:
                self.spare.extend(batch)
                self.created += len(batch)
                self._changed.notify_all()
            made += len(batch)
            # Told after it is spare: a plan that the scheduler makes from it finds it.
            self._untold_created += len(batch)
            if len(batch) < count:
                self._untold_never_ready += (promised - made) * self._account.granule_bytes
                promised = made
            self.settle()
        return made

    def _make_batch(self, count: int) -> list[Handles]:
        """Create so many granules' handles, or fewer if one fails, which is noted."""
        batch: list[Handles] = []
        try:
            while len(batch) < count:
                batch.append(self._make())
        except (CapacityError, DriverError) as error:
            self._note_failure(error)
        return batch

    def _make(self) -> Handles:
        """Create one granule's handles, all or none."""
        with ExitStack() as undo:
            handles = []
            for _ in range(self._segments):
                handles.append(self._driver.create(self._page_bytes))
                undo.callback(self._driver.release, handles[-1])
            undo.pop_all()
        return tuple(handles)

    def _note_failure(self, error: CapacityError | DriverError) -> None:
        if isinstance(error, DriverError):
            self.growth_ended = error
            log.error("the driver failed; this rank keeps what it has and grows no more: %s", error)
        else:
            log.info("a lease could not be filled, others may have taken the memory: %s", error)

    def _satisfied(self) -> None:
        if self._demand_bytes and not self.growth_ended and self._tell(self._account.refuse, 0):
            self._demand_bytes = 0
        self._may_retry_at_once()

    def _may_retry_at_once(self) -> None:
        self._retry_seconds, self._retry_at = FIRST_RETRY_SECONDS, float("-inf")

    def _retry(self, now: float) -> float:
        """Return how long to wait: 20 ms, doubling to 200 ms."""
        wait = self._retry_seconds
        self._retry_at = now + wait
        self._retry_seconds = min(2 * wait, LAST_RETRY_SECONDS)
        return wait

    @staticmethod
    def _tell(call: Callable[..., Any], *arguments: int) -> bool:
        try:
            call(*arguments)
        except BusyError:
            return False
        return True
