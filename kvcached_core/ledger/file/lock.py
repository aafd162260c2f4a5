"""The lock of a ledger: a flock, held for microseconds of arithmetic and waited for with a bound."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvcached_core.errors import BusyError
from kvcached_core.ledger.file.descriptors import close_private, open_private

BOUND_SECONDS = 1.0
_PAUSE_SECONDS = (50e-6, 1e-3)  # the first wait and the longest


class LedgerLock:
    """Mutual exclusion among processes and threads: each of them opens the file for itself.

    The kernel frees the lock when its holder dies. A holder that is stopped keeps it, and others get
    BusyError.
    """

    def __init__(self, path: Path, mode: int = 0o600, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:  # fmt: skip
        self._path = path
        self._mode = mode
        self._clock = clock
        self._sleep = sleep

    @contextlib.contextmanager
    def held(self, bound_seconds: float = BOUND_SECONDS) -> Iterator[None]:
        """Hold the lock. Raises BusyError after `bound_seconds`, OSError if the folder is missing."""
        fd = self._take(bound_seconds)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: a process just forked may share it
            close_private(fd)

    @contextlib.contextmanager
    def held_if_possible(self, bound_seconds: float = 2e-3) -> Iterator[bool]:
        """Hold the lock if it is free; for changes that are safe without it. Yields whether it is held."""
        try:
            fd = self._take(bound_seconds)
        except (BusyError, OSError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            close_private(fd)

    def _take(self, bound_seconds: float) -> int:
        pause, longest = _PAUSE_SECONDS
        end: float | None = None
        while True:
            fd = self._try()
            if fd is not None:
                return fd
            now = self._clock()
            end = now + bound_seconds if end is None else end
            if now >= end:
                raise BusyError(
                    f"{self._path} was held by another process for {bound_seconds:g} s; nothing was changed. "
                    f"If its holder is stopped (state T in ps), let it continue or end it: fuser {self._path}"
                )
            self._sleep(min(pause, end - now))
            pause = min(2 * pause, longest)

    def _try(self) -> int | None:
        fd = open_private(self._path, os.O_RDWR | os.O_CREAT, self._mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, named = os.fstat(fd), os.stat(self._path)
        except (BlockingIOError, FileNotFoundError):
            close_private(fd)
            return None
        if (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):  # deleted and made anew: another lock
            close_private(fd)
            return None
        if held.st_mode & 0o777 != self._mode and held.st_uid == os.getuid():
            os.fchmod(fd, self._mode)
        return fd
