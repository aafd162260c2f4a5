"""What the ledger says of the engine's KV memory, over time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot

INTERVAL_SECONDS = 0.2


class Sample(NamedTuple):
    """Bytes of KV memory at a moment: held = used + cached + stranded + spare."""

    at_seconds: float
    used: int
    cached: int
    spare: int  # also the rest of partly used granules
    limit: int

    @property
    def held(self) -> int:
        return self.used + self.cached + self.spare


class Mark(NamedTuple):
    """Something that happened."""

    at_seconds: float
    text: str


class Recorder:
    """Samples and marks since the beginning."""

    def __init__(self, runtime: Runtime, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._runtime = runtime
        self._name = name
        self._clock = clock
        self._begun = clock()
        self.samples: list[Sample] = []
        self.marks: list[Mark] = []

    def sample(self) -> Sample:
        """Read the ledger once; raises LedgerError if the engine is not in it."""
        owners = [
            o for device in snapshot(self._runtime) for o in device.owners if o.name == self._name and o.live
        ]
        if not owners:
            raise LedgerError(f"no engine named {self._name} in the ledger")
        ready = sum(owner.ready_bytes for owner in owners)
        # words of two processes: for a moment they may not fit each other; what is held is the worker's word
        used = min(ready, sum(owner.used_bytes for owner in owners))
        cached = min(ready - used, sum(owner.cached_bytes for owner in owners))
        limit = sum(owner.limit_bytes for owner in owners)
        taken = Sample(self._clock() - self._begun, used, cached, ready - used - cached, limit)
        self.samples.append(taken)
        return taken

    def mark(self, text: str) -> None:
        """Note an event at this moment."""
        self.marks.append(Mark(self._clock() - self._begun, text))

    async def run(self, show: Callable[[Sample], None]) -> None:
        """Sample until cancelled, and show each sample."""
        while True:
            show(self.sample())
            await asyncio.sleep(INTERVAL_SECONDS)

    def peak(self, after_seconds: float = 0.0) -> int:
        """Return the most that was held since a moment, in bytes; 0 without samples."""
        return max((s.held for s in self.samples if s.at_seconds >= after_seconds), default=0)
