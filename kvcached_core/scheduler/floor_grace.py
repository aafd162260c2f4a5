"""The time that running requests have to end before another engine's floor preempts them."""

from __future__ import annotations

FLOOR_GRACE_SECONDS = 0.3


class FloorGrace:
    """Starts when the engine holds more than another engine's floor leaves to it; ends after 0.3 s.

    A request for more memory does not restart it. It is over once the engine holds little enough, or once
    the other engine no longer asks.
    """

    def __init__(self) -> None:
        self._ends_at: float | None = None

    def note(self, now: float, must: int, held: int) -> None:
        """Note that `held` granules are held and `must` are to be left; `must` is 0 if nobody asks."""
        if not 0 < must < held:
            self._ends_at = None
        elif self._ends_at is None:
            self._ends_at = now + FLOOR_GRACE_SECONDS

    def is_over(self, now: float) -> bool:
        """Say whether the engine still holds too much and the grace has ended: requests are preempted."""
        return self._ends_at is not None and now >= self._ends_at

    def deadline(self, now: float) -> float | None:
        """Return when the grace ends, or None if it has ended: an idle engine is woken for it once."""
        return None if self.is_over(now) else self._ends_at
