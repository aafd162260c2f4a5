"""Waiting for memory between two steps."""

from __future__ import annotations

from collections.abc import Callable

POLL_SECONDS = 0.0005  # much shorter than a step, much longer than one read of the ledger


def poll_while(
    condition: Callable[[], bool],
    seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> float:
    """Sleep in short turns while `condition()` holds, `seconds` at most; return the seconds that passed."""
    began = now = clock()
    while now < began + seconds and condition():
        sleep(POLL_SECONDS)
        now = clock()
    return now - began
