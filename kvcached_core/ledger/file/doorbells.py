"""Doorbells: one FIFO each for a worker and its engine. Ringing never blocks and never fails."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kvcached_core.ledger.file.descriptors import close_private, open_private


def make_bell(path: Path, mode: int) -> None:
    """Create the FIFO anew. Raises OSError."""
    path.unlink(missing_ok=True)
    os.mkfifo(path, mode)
    path.chmod(mode)  # whatever the umask was


def open_bell(path: Path) -> int:
    """Return a descriptor to poll. Open for writing too, so that it never reports a hang-up.

    Raises OSError.
    """
    return open_private(path, os.O_RDWR | os.O_NONBLOCK)


def drain_bell(fd: int) -> None:
    """Read all that was rung."""
    with contextlib.suppress(BlockingIOError):
        while len(os.read(fd, 4096)) == 4096:
            pass


def ring(path: Path) -> None:
    """Ring once. Nobody listening, a full pipe and a missing one are all fine."""
    with contextlib.suppress(OSError):
        fd = open_private(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b"\1")
        finally:
            close_private(fd)


class Ringer:
    """Rings one bell often: keeps it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def ring(self) -> None:
        """Ring once; opens the bell when that is possible for the first time."""
        with contextlib.suppress(OSError):
            if self._fd < 0:
                self._fd = open_private(self._path, os.O_WRONLY | os.O_NONBLOCK)
            os.write(self._fd, b"\1")

    def close(self) -> None:
        if self._fd >= 0:
            close_private(self._fd)
            self._fd = -1
