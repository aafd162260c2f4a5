"""The two locks of a pool: its state, and the precedence of steps over the supply thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PoolLock:
    """`changed` guards a pool's state; `step_first` lets a step that waits for `changed` go before others.

    `changed` is never held across a driver's create, clean or release, nor while a fence is waited for.
    A step holds `step_first`, and then `changed`, for all of apply(). The supply thread holds `step_first`
    only until it has `changed`. So a step waits for one row of granules at most, and nothing is premapped
    while a step waits for handles.
    """

    def __init__(self) -> None:
        """Make both locks, free."""
        self.changed = threading.Condition(threading.Lock())
        self.step_first = threading.Lock()

    @contextmanager
    def after_steps(self) -> Iterator[None]:
        """Hold `changed`; a step that waits for it goes first."""
        with self.step_first:
            self.changed.acquire()
        try:
            yield
        finally:
            self.changed.release()
