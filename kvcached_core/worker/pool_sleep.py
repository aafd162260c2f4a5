"""Sleep: the pool holds only the first granule of each arena and leases no more."""

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
    """Gives back more than plans ordered; the scheduler learns of it from the count of released granules.

    Created and released go on as though the missing granules had been created and released by plans, so
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
        """Unmap and free all but the first granules. No step may run and no plan may come before end().

        Raises DriverError if memory stays behind; then no plan is carried out any more.
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
        """Count as though `created` granules had been created so far; between begin() and end()."""
        self._handles.recount(created)

    def take_turn(self) -> None:
        """Take a supply turn in the caller's thread; afterwards the ledger's counts are exact."""
        if self._handles.asleep:
            with self._after_steps():
                handles = self._handles
                handles.release_target = max(handles.release_target, handles.created - self._kept())
        self._thread.turn(self._clock(), rung=False)

    def fail(self, error: Exception) -> None:
        """Refuse all further plans: some ranks lack memory that the scheduler counts on."""
        self._thread.fail(error)

    def end(self) -> None:
        """Lease memory again; may be repeated."""
        self._handles.asleep = False
        self._thread.wake()

    def _kept(self) -> int:
        return sum(map(self._arenas.ledger_granules, self._arenas.firsts))

    def _is_empty(self) -> bool:
        return self._handles.is_reported and self._handles.created - self._handles.released == self._kept()
