"""File descriptors that die with the process that opened them, also in its forked children.

A flock belongs to the open file, which a fork shares: a child that kept a copy would keep its dead parent
alive in the ledger. Such descriptors are opened here; O_CLOEXEC covers exec, a fork handler the rest.
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
    """Close it; nothing happens in a forked child, where the number may mean another file by now."""
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


# The mutex is held over the fork, so that no descriptor is open without being in the set.
os.register_at_fork(before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=_forked)
