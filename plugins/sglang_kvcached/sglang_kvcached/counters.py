"""Counts for the ledger: pages evicted and requests retracted since the engine began; busy or idle."""

from __future__ import annotations

from collections.abc import Callable

from kvcached_core.scheduler.activity import ActivityReport, WriteCounts


class Counters:
    """Writes the counts when they change.

    `write` gets evictions, retractions, busy, and when the engine became idle in ms; `report` gets events.
    """

    def __init__(self, write: WriteCounts | None = None,
                 report: Callable[..., None] = lambda *_, **__: None) -> None:  # fmt: skip
        self._activity = ActivityReport(write)
        self.report = report
        self.retractions = 0
        self._decoding = 0
        self._has_refused = False

    def note_decoding(self, requests: int, must_bytes: int) -> None:
        """Note how many requests SGLang wants to decode; after a refusal, missing ones were retracted."""
        retracted = max(0, self._decoding - requests) if self._has_refused else 0
        if retracted:
            self.retractions += retracted
            self.report("preempt", requests=retracted, must_bytes=must_bytes)
        self._decoding, self._has_refused = requests, False

    def refuse_decoding(self) -> bool:
        """Note that the requests do not fit; returns False."""
        self._has_refused = True
        return False

    def write(self, busy: bool, now: float, evictions: int) -> None:
        """Write the counts if they changed; `now` is in seconds."""
        self._activity.set_busy(busy, now)
        self._activity.publish(evictions, self.retractions)
