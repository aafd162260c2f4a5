"""Wait for a condition: the one poller of tests and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

POLL_SECONDS = 0.02


def until(
    condition: Callable[[], bool],
    seconds: float,
    what: str | Callable[[], str],
    poll_seconds: float = POLL_SECONDS,
) -> float:
    """Poll until the condition holds, and return the seconds that took.

    `what` names the condition, or is called for its state when time is up. Raises TimeoutError with it.
    """
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(poll_seconds)
    return time.monotonic() - begun


def holds_within(condition: Callable[[], bool], seconds: float, poll_seconds: float = POLL_SECONDS) -> bool:
    """Poll until the condition holds or time is up; return whether it held."""
    try:
        until(condition, seconds, "", poll_seconds)
    except TimeoutError:
        return condition()
    return True


def seen(condition: Callable[[], bool], requests: Sequence[Future[Any]]) -> bool:
    """Poll until the condition holds or all requests have ended; return whether it was seen to hold."""
    while not condition():
        if all(request.done() for request in requests):
            return condition()  # the last request to end may have made it true
        time.sleep(POLL_SECONDS)
    return True
