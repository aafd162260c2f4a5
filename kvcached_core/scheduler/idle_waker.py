"""A thread that wakes an idle engine when it has to give memory back, and costs nothing otherwise."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence


class IdleWaker:
    """Sleeps in poll() until a doorbell rings or a deadline passes, then calls `wake`.

    `doorbells` are file descriptors that become readable; `drain` empties them. `deadline` says when to look
    again, in seconds of `clock`, or None; who changes it calls `tell`. `wake` has to make the engine look,
    which moves the deadline: it is called once for each.
    """

    def __init__(
        self,
        doorbells: Sequence[int],
        drain: Callable[[], None],
        deadline: Callable[[], float | None],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._drain = drain
        self._deadline = deadline
        self._wake = wake
        self._clock = clock
        self._stopping = False
        self._woken_for: float | None = None
        self._told_read, self._told_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        for descriptor in (*doorbells, self._told_read):
            self._poll.register(descriptor, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="kvcached-idle-waker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def tell(self) -> None:
        """Make the thread read the deadline anew; never blocks, and does nothing once it was stopped."""
        if not self._stopping:
            self._write()

    def turn(self) -> None:
        """Sleep once; wake the engine if a doorbell rang or the deadline has passed."""
        rang = [descriptor for descriptor, _ in self._poll.poll(self._timeout_milliseconds())]
        if self._told_read in rang:
            os.read(self._told_read, 4096)
            rang.remove(self._told_read)
        if rang:
            self._drain()
        deadline = self._deadline()
        due = deadline is not None and deadline != self._woken_for and self._clock() >= deadline
        if due:
            self._woken_for = deadline
        if rang or due:
            self._wake()

    def _timeout_milliseconds(self) -> float | None:
        deadline = self._deadline()
        if deadline is None or deadline == self._woken_for:
            return None
        return max(0.0, deadline - self._clock()) * 1000 + 1

    def stop(self) -> None:
        """End the thread and close its pipe; may be called twice."""
        if self._stopping:
            return
        self._stopping = True
        self._write()
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._told_read)
        os.close(self._told_write)

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been told often enough
            os.write(self._told_write, b"!")

    def _run(self) -> None:
        while not self._stopping:
            self.turn()
