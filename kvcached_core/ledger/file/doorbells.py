"""Doorbells: FIFOs that wake a worker or an engine. Ringing never blocks and never fails."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kvcached_core.ledger.file.descriptors import close_private, open_private


def make_bell(path: Path, mode: int) -> None:
    """Create the FIFO, in place of an old one. Raises OSError."""
    path.unlink(missing_ok=True)
    os.mkfifo(path, mode)
    path.chmod(mode)  # mkfifo applies the umask


def open_bell(path: Path) -> int:
    """Return a descriptor to poll. Raises OSError.

    It is open for writing too, so poll() never reports a hang-up.
    """
    return open_private(path, os.O_RDWR | os.O_NONBLOCK)


def drain_bell(fd: int) -> None:
    """Empty the FIFO."""
    with contextlib.suppress(BlockingIOError):
        while len(os.read(fd, 4096)) == 4096:
            pass


def ring(path: Path) -> None:
    """Ring once. Do nothing if the FIFO is missing or full, or nobody listens."""
    with contextlib.suppress(OSError):
        fd = open_private(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b"\1")
        finally:
            close_private(fd)


class Ringer:
    """Rings one doorbell again and again: keeps it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def ring(self) -> None:
        """Ring once; open the FIFO as soon as it exists."""
        with contextlib.suppress(OSError):
            if self._fd < 0:
                self._fd = open_private(self._path, os.O_WRONLY | os.O_NONBLOCK)
            os.write(self._fd, b"\1")

    def close(self) -> None:
        if self._fd >= 0:
            close_private(self._fd)
            self._fd = -1
