"""A simulated clock, and processes that sleep on it. One process runs at a time, always in the same order."""

from __future__ import annotations

import heapq
import select
import threading
from collections.abc import Callable, Sequence
from itertools import count

BELL_SECONDS = 50e-6  # from a doorbell's ring until the sleeping process runs


class _Over(BaseException):
    """Raised in a sleeping process to end it once its world has stopped."""


def _closed_lock() -> threading.Lock:
    """Return a lock that is held already: acquiring it waits until another thread releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Process:
    """A simulated process, made by World.spawn(). Only its own code calls sleep(); any may call wake()."""

    def __init__(self, world: World, body: Callable[[Process], None]) -> None:
        self._world = world
        self._body = body
        self.turn = _closed_lock()
        self.ticket = 0  # number of its current sleep
        self.hears = self.ended = False
        self._rung = self._woken = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def sleep(self, seconds: float | None, hears: bool = False) -> bool:
        """Sleep for `seconds`; with `hears`, a doorbell or wake() ends the sleep earlier.

        With `seconds` None, only these end it. Return whether a doorbell rang.
        """
        self._rung, self.hears, self.ticket = False, hears, self.ticket + 1
        if hears and self._woken:
            self._woken, seconds = False, 0.0
        if not (seconds is not None and self._world.passes(seconds, self)):
            self._world.yield_turn(self)
        self.hears = False
        return self._rung

    def wake(self) -> None:
        """End the current sleep if it is one with `hears`, otherwise the next such sleep."""
        if self.hears:
            self.hears = False
            self._world.plan(BELL_SECONDS, self)
        else:
            self._woken = True

    def ring(self) -> None:
        """Wake the process if it sleeps with `hears`; otherwise the bell stays set until such a sleep."""
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
        self._control = _closed_lock()  # released when no process is left to run
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
        """Start a process now. `bells` are the descriptors of its doorbells; its own code drains them."""
        process = Process(self, body)
        self._processes.append(process)
        for bell in bells:
            self._bells[bell] = process
            self._poll.register(bell, select.POLLIN)
        self.plan(0.0, process)
        return process

    def plan(self, seconds: float, process: Process) -> None:
        """Give a process its turn after `seconds`, unless its sleep has ended before."""
        heapq.heappush(self._planned, (self.now + seconds, next(self._numbers), process.ticket, process))

    def run(self, until: float) -> None:
        """Run the processes up to the time `until`. Raises the error that a process raised."""
        self._until = until
        self.pass_on()
        self._control.acquire()
        if self.failure is not None:
            raise self.failure
        self.now = until

    def passes(self, seconds: float, process: Process) -> bool:
        """If nothing happens during a sleep, advance the clock and return True; otherwise plan its end."""
        if not process.hears:
            self._hear()
            at = self.now + seconds
            if at <= self._until and (not self._planned or at < self._planned[0][0]) and not self.over:
                self.now = at
                return True
        self.plan(seconds, process)
        return False

    def yield_turn(self, process: Process) -> None:
        """Let other processes run until this process's turn comes."""
        if self.pass_on(process):
            return
        process.turn.acquire()
        if self.over:
            raise _Over

    def pass_on(self, mine: Process | None = None) -> bool:
        """Let the next process run. Return whether the next process is `mine`, which then simply goes on."""
        following = self._next()
        if following is None:
            self._control.release()
        elif following is not mine:
            following.turn.release()
        return following is not None and following is mine

    def stop(self) -> None:
        """End all processes; each ends inside its sleep."""
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
