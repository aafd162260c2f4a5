"""The worker's thread that makes memory before steps need it, and frees memory that plans let go."""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable

from kvcached_core.errors import DriverError, InvariantError
from kvcached_core.gil import short_waits
from kvcached_core.worker.lease_account import LeaseAccount
from kvcached_core.worker.supply_turn import SupplyTurn

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0


class SupplyThread:
    """Takes a turn whenever the doorbell or wake() asks for one. While nothing asks it costs nothing."""

    def __init__(
        self, account: LeaseAccount, turn: SupplyTurn, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare a thread that runs `turn` and listens to the doorbell of `account`; start() starts it."""
        self._account = account
        self._turn = turn
        self._clock = clock
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._failure: BaseException | None = None
        self.is_at_work = False  # in a turn; other threads read it without a lock
        self._turns = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kvcached-supply", daemon=True)

    def start(self) -> None:
        """Begin to take turns."""
        self._thread.start()

    def wake(self) -> None:
        """Ask for a turn; never blocks."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread after its turn. May be called again, and without start().

        Raises DriverError if the turn takes longer than 30 s.
        """
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
        return self._turn.device_failed

    def fail(self, error: BaseException) -> None:
        """Refuse all further plans, with this error as the cause."""
        self._failure = error

    def raise_failure(self) -> None:
        """Raise InvariantError if the thread has ended with an error, so that the engine sees it."""
        if self._failure is not None:
            raise InvariantError(f"the supply thread has ended: {self._failure}") from self._failure

    def turn(self, now: float, rung: bool = True) -> float | None:
        """Do all that can be done now; return the seconds until the next turn, or None if none is needed.

        `rung` says that the doorbell asked for this turn: then unmet demand is tried again at once.
        May be called from any thread.
        """
        with self._turns:
            self.is_at_work = True
            try:
                return self._turn.run(now, rung)
            finally:
                self.is_at_work = False

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
