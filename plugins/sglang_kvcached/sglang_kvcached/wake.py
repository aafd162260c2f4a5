"""Wakes an idle scheduler when its memory asks for it, and costs it nothing otherwise."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvcached_core.scheduler.idle_waker import IdleWaker

_POLLIN = 1  # zmq's and poll's


class Bells(Protocol):
    """What a desk offers to whoever sleeps beside it."""

    def filenos(self) -> Sequence[int]: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...


class Waker:
    """A thread that sleeps on the ledger's doorbells and the governor's deadline.

    A scheduler that sleeps when it is idle (--sleep-on-idle) is woken through the poller in which it sleeps;
    one that spins finds a flag.
    """

    def __init__(self, bells: Bells, sleeper: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """`sleeper` is SGLang's IdleSleeper, or None."""
        self._bells = bells
        self._clock = clock
        self._steward: IdleWaker | None = None
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._rang = False
        poller = getattr(sleeper, "poller", None)
        self._poller = poller
        if poller is not None:
            poller.register(self._event, _POLLIN)

    def start(self, deadline: Callable[[], float | None]) -> None:
        """Start the thread; `deadline` says when to look again, in seconds of the clock."""
        self._steward = IdleWaker(self._bells.filenos(), self._bells.drain, deadline, self._ring, self._clock)
        self._steward.start()

    def tell(self) -> None:
        """Make the thread read the deadline anew."""
        if self._steward is not None:
            self._steward.tell()

    def take(self) -> bool:
        """Say whether it rang since the last call."""
        rang, self._rang = self._rang, False
        if rang:
            with contextlib.suppress(BlockingIOError):  # read already, after the ring before
                os.eventfd_read(self._event)
        return rang

    def close(self) -> None:
        """End the thread; may be repeated."""
        if self._event < 0:
            return
        if self._steward is not None:
            self._steward.stop()
        if self._poller is not None:
            self._poller.unregister(self._event)
        self._bells.close()
        os.close(self._event)
        self._event = -1

    def _ring(self) -> None:
        # The event first: whoever takes the flag finds it, and else is woken once more.
        os.eventfd_write(self._event, 1)
        self._rang = True
