"""Shorter waits for Python's interpreter lock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_SECONDS = 100e-6

_mutex = threading.Lock()
_inside = 0
_before = 0.0


@contextmanager
def short_waits() -> Iterator[None]:
    """Let any thread of the process get the interpreter lock within 100 us, while the context lasts.

    A driver call releases the lock, and the engine's loop takes it. The caller then gets it back after
    Python's switch interval, 5 ms by default, however short the call was: 10,000 calls would take a minute.
    """
    global _inside, _before
    with _mutex:
        if not _inside:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, SWITCH_SECONDS))
        _inside += 1
    try:
        yield
    finally:
        with _mutex:
            _inside -= 1
            if not _inside:
                sys.setswitchinterval(_before)
