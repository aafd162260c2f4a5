"""How long a thread waits for Python's interpreter lock."""

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
    """Get the interpreter lock back within 100 us, for as long as this lasts, in the whole process.

    A driver call gives the lock away, and an engine's loop that computes takes it: the call then returns
    after Python's switch interval, 5 ms, whatever it took itself. Ten thousand such calls are a minute.
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
