"""A simulated clock, and processes that sleep on it: one runs at a time, always in the same order."""

from __future__ import annotations

import heapq
import select
import threading
from collections.abc import Callable, Sequence
from itertools import count

BELL_SECONDS = 50e-6  # from a doorbell's ring until the sleeping process runs


class _Over(BaseException):
    """Ends a process of a world that has stopped."""


def _closed_lock() -> threading.Lock:
    """Return a lock that is held already: acquiring it waits until another thread releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Process:
    """Code that sleeps, made by `World.spawn`. Its own code calls `sleep`; any code calls `wake`."""

    def __init__(self, world: World, body: Callable[[Process], None]) -> None:
        self._world = world
        self._body = body
        self.turn = _closed_lock()
        self.ticket = 0  # of the sleep that it is in
        self.hears = self.ended = False
        self._rung = self._woken = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def sleep(self, seconds: float | None, hears: bool = False) -> bool:
        """Sleep for `seconds`, or with `hears` until a bell rings or wake() is called, if that is sooner.

        None sleeps until then. Return whether a bell rang.
        """
        self._rung, self.hears, self.ticket = False, hears, self.ticket + 1
        if hears and self._woken:
            self._woken, seconds = False, 0.0
        if not (seconds is not None and self._world.passes(seconds, self)):
            self._world.yield_turn(self)
        self.hears = False
        return self._rung

    def wake(self) -> None:
        """End its sleep now, or else the next one in which it hears."""
        if self.hears:
            self.hears = False
            self._world.plan(BELL_SECONDS, self)
        else:
            self._woken = True

    def ring(self) -> None:
        """Wake the process if it hears its bell; otherwise it finds the bell ringing later."""
        if self.hears:
            self._rung = True
            self.wake()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self._world.over:
                self._body(self)
        except _Over:
            pass
        except BaseException as error:
            self._world.failure = error
        finally:
            self.ended = True
            self._world.pass_on()


class World:
    """The clock and the planned turns. Time begins at 1 s, because 0 means no time in the ledger."""

    def __init__(self) -> None:
        self.now = 1.0
        self.over = False
        self.failure: BaseException | None = None
        self._control = _closed_lock()  # released when there is nothing more to run
        self._until = self.now
        self._numbers = count()
        self._planned: list[tuple[float, int, int, Process]] = []
        self._processes: list[Process] = []
        self._bells: dict[int, Process] = {}
        self._poll = select.poll()

    def clock(self) -> float:
        """Return the seconds on the simulated clock."""
        return self.now

    def spawn(self, body: Callable[[Process], None], bells: Sequence[int] = ()) -> Process:
        """Start a process now; these descriptors are its doorbells, which it drains by itself."""
        process = Process(self, body)
        self._processes.append(process)
        for bell in bells:
            self._bells[bell] = process
            self._poll.register(bell, select.POLLIN)
        self.plan(0.0, process)
        return process

    def plan(self, seconds: float, process: Process) -> None:
        """Give a process its turn after so many seconds, unless its sleep has ended before."""
        heapq.heappush(self._planned, (self.now + seconds, next(self._numbers), process.ticket, process))

    def run(self, until: float) -> None:
        """Let time pass until `until`. Raises the error that a process raised."""
        self._until = until
        self.pass_on()
        self._control.acquire()
        if self.failure is not None:
            raise self.failure
        self.now = until

    def passes(self, seconds: float, process: Process) -> bool:
        """Plan the end of a sleep; or pass the time at once, where nothing happens before it, and say so."""
        if not process.hears:
            self._hear()
            at = self.now + seconds
            if at <= self._until and (not self._planned or at < self._planned[0][0]) and not self.over:
                self.now = at
                return True
        self.plan(seconds, process)
        return False

    def yield_turn(self, process: Process) -> None:
        """Let others run until this process's turn comes."""
        if self.pass_on(process):
            return
        process.turn.acquire()
        if self.over:
            raise _Over

    def pass_on(self, mine: Process | None = None) -> bool:
        """Let the next process run; say whether that is this one, which then simply goes on."""
        following = self._next()
        if following is None:
            self._control.release()
        elif following is not mine:
            following.turn.release()
        return following is not None and following is mine

    def stop(self) -> None:
        """End all processes where they sleep."""
        self.over = True
        for process in self._processes:
            if not process.ended:
                process.turn.release()
                self._control.acquire()
            process.thread.join()

    def _next(self) -> Process | None:
        """Return the next process, after advancing the clock to its turn; None at the end of the run."""
        self._hear()
        while self._planned and self._planned[0][0] <= self._until:
            if self.over or self.failure is not None:
                return None
            at, _, ticket, process = heapq.heappop(self._planned)
            if ticket == process.ticket and not process.ended:
                self.now = max(self.now, at)
                return process
        return None

    def _hear(self) -> None:
        for bell, _ in self._poll.poll(0):
            self._bells[bell].ring()
