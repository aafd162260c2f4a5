"""A thread that wakes an idle engine to give memory back. It uses no CPU time in between."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence


class IdleWaker:
    """Sleeps in poll() until a doorbell rings or a deadline passes, then calls `wake`.

    `doorbells` are file descriptors that become readable; `drain` empties them. `deadline` returns a time of
    `clock` in seconds, or None; call `read_deadline_again` when it has changed. `wake` makes the engine's
    loop run once, which sets the next deadline: each deadline wakes once.
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
        self._pipe_read, self._pipe_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        for descriptor in (*doorbells, self._pipe_read):
            self._poll.register(descriptor, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="kvcached-idle-waker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def read_deadline_again(self) -> None:
        """Make the thread read the deadline again. Never blocks; does nothing once the thread is stopped."""
        if not self._stopping:
            self._write()

    def wait_once(self) -> None:
        """Sleep once, and wake the engine if a doorbell rang or the deadline has passed."""
        rang = [descriptor for descriptor, _ in self._poll.poll(self._timeout_milliseconds())]
        if self._pipe_read in rang:
            os.read(self._pipe_read, 4096)
            rang.remove(self._pipe_read)
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
        """End the thread and close its pipe. A second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._write()
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._pipe_read)
        os.close(self._pipe_write)

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so the thread wakes anyway
            os.write(self._pipe_write, b"!")

    def _run(self) -> None:
        while not self._stopping:
            self.wait_once()
