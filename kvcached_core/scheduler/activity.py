"""Whether an engine is busy, and how often it evicted and preempted, as the ledger shows it."""

from __future__ import annotations

from collections.abc import Callable

WriteCounts = Callable[[int, int, bool, int], None]


class ActivityReport:
    """Writes an engine's counts to the ledger, and only when one has changed.

    `write` gets the evictions and preemptions since the engine began, whether it is busy, and the time in
    milliseconds at which it became idle (0 while busy).
    """

    def __init__(self, write: WriteCounts | None) -> None:
        """`write` is None on a rank that does not report."""
        self._write = write
        self._written: tuple[int, int, bool, int] | None = None
        self._idle_since_ms = 0

    def set_busy(self, busy: bool, now: float) -> None:
        """Note whether the engine has requests; `now` is in seconds."""
        if busy:
            self._idle_since_ms = 0
        elif not self._idle_since_ms:
            self._idle_since_ms = max(1, int(now * 1000))

    def publish(self, evictions: int, preemptions: int) -> None:
        """Write the counts if they differ from those last written."""
        counts = (evictions, preemptions, not self._idle_since_ms, self._idle_since_ms)
        if counts != self._written and self._write is not None:
            self._written = counts
            self._write(*counts)
