"""When to retry a lease or a creation that was refused."""

from __future__ import annotations

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.02, 0.2


class Backoff:
    """Waits 20 ms after the first refusal and doubles the wait up to 200 ms; times are clock seconds."""

    def __init__(self) -> None:
        """Allow the first attempt at once."""
        self._next_wait = FIRST_RETRY_SECONDS
        self._retry_at = float("-inf")

    def seconds_left(self, now: float) -> float:
        """Return the seconds until the next attempt; zero or less if it is due."""
        return self._retry_at - now

    def refused(self, now: float) -> float:
        """Note a refusal; return the seconds until the next attempt."""
        wait = self._next_wait
        self._retry_at = now + wait
        self._next_wait = min(2 * wait, LAST_RETRY_SECONDS)
        return wait

    def reset(self) -> None:
        """Allow the next attempt at once."""
        self._next_wait, self._retry_at = FIRST_RETRY_SECONDS, float("-inf")
