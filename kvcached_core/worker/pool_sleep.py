"""A pool that sleeps: it holds the first granule of each arena alone, and wants nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from kvcached_core.driver.base import Driver
from kvcached_core.errors import DriverError
from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.supply_thread import STOP_SECONDS, SupplyThread

_PAUSE_SECONDS = 1e-3


class PoolSleep:
    """Gives back more than plans have ordered. The scheduler finds out by the count of released granules.

    Both counts go on as though what is missing had been made and freed in the usual way, so that
    held = min over ranks(created) - released stays true on every rank.
    """

    def __init__(
        self,
        driver: Driver,
        arenas: Arenas,
        handles: HandlePool,
        thread: SupplyThread,
        unmap_later: Callable[[Iterable[int], Iterable[int]], None],
        after_steps: Callable[[], AbstractContextManager[None]],
        clock: Callable[[], float],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._driver = driver
        self._arenas = arenas
        self._handles = handles
        self._thread = thread
        self._unmap_later = unmap_later
        self._after_steps = after_steps
        self._clock = clock
        self._sleep = sleep

    @property
    def created(self) -> int:
        """Granules ever created."""
        return self._handles.created

    def begin(self) -> None:
        """Unmap and free all but the first granules. No step runs, and no plan comes before end().

        Raises DriverError if something stays behind: then no plan is carried out any more.
        """
        with self._after_steps():
            self._handles.asleep = True
            firsts = self._arenas.firsts
            self._unmap_later([g for g in self._arenas.mapped if g not in firsts], (0,))
        self._driver.synchronize()
        give_up_at = self._clock() + STOP_SECONDS
        while True:
            self.take_turn()  # at least one: a growth may have been under way
            if self._is_empty():
                return
            if self._thread.device_failed or self._clock() > give_up_at:
                left = self._handles.created - self._handles.released
                error = DriverError("give the KV cache back", -1, f"{left} granules are still there")
                self.fail(error)
                raise error
            self._sleep(_PAUSE_SECONDS)

    def recount(self, created: int) -> None:
        """Count as though `created` granules had been made so far; between begin() and end()."""
        self._handles.recount(created)

    def take_turn(self) -> None:
        """Do here and now what the supply thread does; what the ledger shows is true afterwards."""
        if self._handles.asleep:
            with self._after_steps():
                self._handles.ordered = max(self._handles.ordered, self._handles.created - self._kept())
        self._thread.turn(self._clock(), rung=False)

    def fail(self, error: Exception) -> None:
        """Let no plan be carried out any more: what the scheduler counts on is not there on all ranks."""
        self._thread.fail(error)

    def end(self) -> None:
        """Let memory be wanted again; may be repeated."""
        self._handles.asleep = False
        self._thread.wake()

    def _kept(self) -> int:
        return sum(map(self._arenas.ledger_granules, self._arenas.firsts))

    def _is_empty(self) -> bool:
        return self._handles.settled and self._handles.created - self._handles.released == self._kept()
