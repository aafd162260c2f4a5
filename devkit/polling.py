"""Wait for a condition by polling. All tests and benchmarks wait with these functions."""

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
    """Poll until the condition holds, and return the elapsed seconds.

    Raises TimeoutError. Its text is `what`, which names the condition or is called to describe the state.
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
    """Poll until the condition holds or all requests have ended; return whether the condition held."""
    while not condition():
        if all(request.done() for request in requests):
            return condition()  # the last request to end may have made it true
        time.sleep(POLL_SECONDS)
    return True
