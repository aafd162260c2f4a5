"""File descriptors that forked children close.

A flock belongs to the open file, which a forked child shares: a child that kept the descriptor would keep its
dead parent alive in the ledger. Such files are opened here. O_CLOEXEC closes them at exec, a fork handler at
fork.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

_mutex = threading.Lock()
_open: set[int] = set()


def open_private(path: str | Path, flags: int, mode: int = 0o600) -> int:
    """Open a file whose descriptor is closed in a forked child. Raises OSError."""
    with _mutex:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        _open.add(fd)
    return fd


def close_private(fd: int) -> None:
    """Close a descriptor; do nothing in a forked child, where the number may be another file by now."""
    with _mutex:
        if fd in _open:
            _open.discard(fd)
            os.close(fd)


def _forked() -> None:
    for fd in _open:
        with contextlib.suppress(OSError):
            os.close(fd)
    _open.clear()
    _mutex.release()


# The mutex is held during the fork, so every open descriptor is in the set.
os.register_at_fork(before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=_forked)
