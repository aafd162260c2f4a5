"""Wakes an idle scheduler when the ledger rings its doorbell or a deadline passes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvcached_core.scheduler.idle_waker import IdleWaker

_POLLIN = 1  # the same value in zmq and poll


class Doorbells(Protocol):
    """The doorbells of a scheduler view, to sleep on."""

    def filenos(self) -> Sequence[int]: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...


class Waker:
    """A thread that sleeps on the ledger's doorbells and the governor's deadline.

    A scheduler that sleeps when idle (--sleep-on-idle) is woken through its own poller. A scheduler that
    spins reads a flag.
    """

    def __init__(
        self, doorbells: Doorbells, sleeper: Any, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`sleeper` is SGLang's IdleSleeper, or None."""
        self._doorbells = doorbells
        self._clock = clock
        self._idle_waker: IdleWaker | None = None
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._has_rung = False
        poller = getattr(sleeper, "poller", None)
        self._poller = poller
        if poller is not None:
            poller.register(self._event, _POLLIN)

    def start(self, deadline: Callable[[], float | None]) -> None:
        """Start the thread; `deadline` returns when to wake the scheduler, in seconds of the clock."""
        self._idle_waker = IdleWaker(
            self._doorbells.filenos(), self._doorbells.drain, deadline, self._ring, self._clock
        )
        self._idle_waker.start()

    def read_deadline_again(self) -> None:
        """Make the thread read a changed deadline."""
        if self._idle_waker is not None:
            self._idle_waker.read_deadline_again()

    def take_ring(self) -> bool:
        """Say whether the thread rang since the last call."""
        rang, self._has_rung = self._has_rung, False
        if rang:
            with contextlib.suppress(BlockingIOError):  # an earlier call read this ring already
                os.eventfd_read(self._event)
        return rang

    def close(self) -> None:
        """End the thread. A second call does nothing."""
        if self._event < 0:
            return
        if self._idle_waker is not None:
            self._idle_waker.stop()
        if self._poller is not None:
            self._poller.unregister(self._event)
        self._doorbells.close()
        os.close(self._event)
        self._event = -1

    def _ring(self) -> None:
        # The event is set before the flag, so take_ring() clears both. A poll between the two wakes twice.
        os.eventfd_write(self._event, 1)
        self._has_rung = True
