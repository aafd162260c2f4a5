"""Finds memory that an engine has not needed for some time."""

from __future__ import annotations

from collections.abc import Callable


class IdleSurplus:
    """Granules that were surplus throughout a window of `idle_seconds`.

    The least surplus of the window counts, so memory that a burst inside the window used is kept.
    `remaining_granules` returns how many granules, empty or new ones, the current requests may still take
    before they end; these are kept too. It is called only at the end of a window that had a surplus.
    """

    def __init__(self, idle_seconds: float, remaining_granules: Callable[[], int]) -> None:
        self.window_ends_at: float | None = None  # None while there is no surplus
        self._idle_seconds = idle_seconds
        self._remaining_granules = remaining_granules
        self._least_surplus = 0  # since the window began

    def granules_to_release(self, now: float, surplus: int, empty: int) -> int:
        """Note the `surplus` at `now`, in granules; return how many of the `empty` ones to release."""
        idle = 0
        if self.window_ends_at is not None:
            self._least_surplus = min(self._least_surplus, surplus)
            if now < self.window_ends_at and surplus > 0:
                return 0
            if now >= self.window_ends_at and self._least_surplus > 0:
                idle = max(0, min(self._least_surplus, empty - self._remaining_granules()))
        self._least_surplus = surplus - idle
        self.window_ends_at = now + self._idle_seconds if self._least_surplus > 0 else None
        return idle
