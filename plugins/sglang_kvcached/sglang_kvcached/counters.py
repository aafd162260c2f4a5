"""Counts for those who watch: pages evicted and requests retracted since the engine began; busy or idle."""

from __future__ import annotations

from collections.abc import Callable


class Counters:
    """Writes what changed. `write` is told evictions, retractions, busy, and the idle time's begin in ms;
    `report` is told events."""

    def __init__(self, write: Callable[[int, int, bool, int], None] | None = None,
                 report: Callable[..., None] = lambda *_, **__: None) -> None:  # fmt: skip
        self._write = write
        self.report = report
        self._written: tuple[int, int, bool, int] | None = None
        self.evictions = self.retractions = 0
        self._idle_since_ms = 0
        self._running = 0
        self._refused = False

    def running(self, requests: int, must_bytes: int) -> None:
        """Note how many requests were asked for; after a refusal those that are missing were retracted."""
        retracted = max(0, self._running - requests) if self._refused else 0
        if retracted:
            self.retractions += retracted
            self.report("preempt", requests=retracted, must_bytes=must_bytes)
        self._running, self._refused = requests, False

    def refuse(self) -> bool:
        """Note that they do not fit; returns False."""
        self._refused = True
        return False

    def note(self, busy: bool, now: float) -> None:
        """Write what there is to write."""
        if busy:
            self._idle_since_ms = 0
        elif not self._idle_since_ms:
            self._idle_since_ms = max(1, int(now * 1000))
        counts = (self.evictions, self.retractions, busy, self._idle_since_ms)
        if counts != self._written and self._write is not None:
            self._written = counts
            self._write(*counts)
