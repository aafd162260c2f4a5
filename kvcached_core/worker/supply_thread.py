"""The thread of a worker that turns wishes into memory, and memory that is let go into room."""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable

from kvcached_core.errors import BusyError, CapacityError, DriverError, InvariantError
from kvcached_core.gil import short_waits
from kvcached_core.worker.handle_pool import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS, HandlePool
from kvcached_core.worker.lease_account import LeaseAccount, MappingStats

log = logging.getLogger(__name__)

FENCE_POLL_SECONDS = 0.001
STOP_SECONDS = 30.0


class SupplyThread:
    """Sleeps until the doorbell or wake() and then takes a turn; idle, it costs nothing."""

    def __init__(
        self,
        account: LeaseAccount,
        handles: HandlePool,
        retire: Callable[[], int],
        premap: Callable[[], bool],
        usage: Callable[[], MappingStats],
        private_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`retire` unmaps what may be unmapped and returns how many granules still wait for a fence;
        `premap` maps some spare granules where they will be wanted and says whether to call it again."""
        self._account = account
        self._handles = handles
        self._retire = retire
        self._premap = premap
        self._usage = usage
        self._told = MappingStats(0, 0, 0)
        self._private_bytes = private_bytes
        self._clock = clock
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._failure: BaseException | None = None
        self._device_failed = False
        self.is_at_work = False  # in a turn; read by others without a lock
        self._turns = threading.Lock()
        self._may_premap = True  # until it fails; again with the next ring of the bell
        self._thread = threading.Thread(target=self._run, name="kvcached-supply", daemon=True)

    def start(self) -> None:
        """Begin to take turns."""
        self._thread.start()

    def wake(self) -> None:
        """Ask for a turn; never blocks."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread after its turn. May be called again, and without start()."""
        if self._wake < 0:
            return
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                raise DriverError("stop the supply thread", -1, f"its turn took over {STOP_SECONDS:g} s")
        os.close(self._wake)
        self._wake = -1

    @property
    def device_failed(self) -> bool:
        """Say whether the driver failed, so that nothing more is given back."""
        return self._device_failed

    def fail(self, error: BaseException) -> None:
        """Let no plan be carried out any more."""
        self._failure = error

    def raise_failure(self) -> None:
        """Raise what ended the thread, if anything did, where the engine will see it."""
        if self._failure is not None:
            raise InvariantError(f"the supply thread has ended: {self._failure}") from self._failure

    def turn(self, now: float, rung: bool = True) -> float | None:
        """Do all that can be done now; return the seconds until the next turn, or None for never by itself.

        `rung` says that somebody asked for this turn: then unmet demand is tried again at once.
        Any thread may call it.
        """
        with self._turns:
            self.is_at_work = True
            try:
                return self._turn(now, rung)
            finally:
                self.is_at_work = False

    def _turn(self, now: float, rung: bool) -> float | None:
        self._account.drain()
        waits = []
        if not self._attempt(self._account.acknowledge):
            waits.append(FIRST_RETRY_SECONDS)
        if not self._device_failed:
            try:
                waits += [FENCE_POLL_SECONDS] if self._give_back() else []
            except CapacityError as error:
                waits.append(LAST_RETRY_SECONDS)
                log.warning("the system had no room even to give memory back; trying again: %s", error)
            except DriverError as error:
                # What is still mapped or alive stays counted: too much, never too little.
                self._device_failed = True
                log.error("the driver failed; this rank gives back no more memory: %s", error)
        self._handles.settle()
        if (wait := self._handles.grow(now, rung)) is not None:
            waits.append(wait)
        self._may_premap |= rung
        if self._attempt_premap():
            waits.append(0.0)
        published = self._attempt(self._publish)
        if not (self._handles.settled and published):
            waits.append(FIRST_RETRY_SECONDS)
        return min(waits) if waits else None

    def _give_back(self) -> int:
        """Unmap and free, a slice after the other, so that others have the first of much memory early.

        Returns how many granules are left that wait for a fence.
        """
        before, waiting = -1, self._retire()
        self._handles.release_owed()
        while waiting and waiting != before:
            before, waiting = waiting, self._retire()
            self._handles.release_owed()
        return waiting

    def _attempt_premap(self) -> bool:
        """Map ahead of need; say whether there may be more to map."""
        if self._device_failed or not self._may_premap:
            return False
        try:
            return self._premap()
        except (CapacityError, DriverError) as error:
            # No handle is lost, and the step that wants one maps it, or says so if that fails too.
            self._may_premap = False
            log.warning("mapping granules ahead of need failed: %s", error)
            return False

    def _publish(self) -> None:
        usage, told = self._usage(), self._told
        self._account.publish(
            usage.mapped_bytes, self._private_bytes(), usage.maps - told.maps, usage.unmaps - told.unmaps,
            usage.map_times,
        )  # fmt: skip
        self._told = usage

    @staticmethod
    def _attempt(call: Callable[[], None]) -> bool:
        try:
            call()
        except BusyError:
            return False
        return True

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._account.fileno(), select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        rung = True
        try:
            while not self._stopping:
                with short_waits():
                    timeout = self.turn(self._clock(), rung)
                events = poller.poll(None if timeout is None else math.ceil(timeout * 1000))
                rung = any(fd != self._wake for fd, _ in events)
                if any(fd == self._wake for fd, _ in events):
                    os.eventfd_read(self._wake)
        except BaseException as error:
            log.exception("the supply thread ends; the next step will say so")
            self._failure = error
