"""Record the engines' KV memory over time, from the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import OwnerSnapshot, snapshot

INTERVAL_SECONDS = 0.2


class Bytes(NamedTuple):
    """KV memory of one engine in bytes: held = used + cached + spare."""

    used: int
    cached: int
    spare: int  # includes unused blocks of partly used granules
    limit: int

    @property
    def held(self) -> int:
        return self.used + self.cached + self.spare


class Sample(NamedTuple):
    """The engines at a moment, and the bytes that they share."""

    at_seconds: float
    engines: dict[str, Bytes]
    budget: int

    @property
    def held(self) -> int:
        return sum(engine.held for engine in self.engines.values())


class Mark(NamedTuple):
    """The time and the text of an event."""

    at_seconds: float
    text: str


class Recorder:
    """Samples and events since the recorder was made."""

    def __init__(
        self, runtime: Runtime, names: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runtime = runtime
        self._names = names
        self._clock = clock
        self._begun = clock()
        self.samples: list[Sample] = []
        self.marks: list[Mark] = []

    @property
    def seconds(self) -> float:
        """Seconds since the recorder was made."""
        return self._clock() - self._begun

    def sample(self) -> Sample:
        """Read the ledger once; raises LedgerError if an engine is not in it."""
        devices = snapshot(self._runtime)
        engines = {}
        for name in self._names:
            owners = [o for device in devices for o in device.owners if o.name == name and o.live]
            if not owners:
                raise LedgerError(f"no engine named {name} in the ledger")
            engines[name] = _bytes(owners)
        budget = sum(device.capacity_bytes - device.headroom_bytes for device in devices)
        taken = Sample(self.seconds, engines, budget)
        self.samples.append(taken)
        return taken

    def mark(self, text: str) -> None:
        """Record an event that happens now."""
        self.marks.append(Mark(self.seconds, text))

    async def run(self, show: Callable[[Sample], None]) -> None:
        """Sample until cancelled, and show each sample."""
        while True:
            show(self.sample())
            await asyncio.sleep(INTERVAL_SECONDS)

    def peak(self, name: str, after_seconds: float = 0.0) -> int:
        """Return the most bytes an engine held since `after_seconds`; raises ValueError without samples."""
        return max(engine.held for engine in self._since(name, after_seconds))

    def peak_used(self, name: str, after_seconds: float = 0.0) -> int:
        """Return the most bytes that its requests used since `after_seconds`."""
        return max(engine.used for engine in self._since(name, after_seconds))

    def least(self, name: str, after_seconds: float = 0.0) -> int:
        """Return the least bytes that it held since `after_seconds`."""
        return min(engine.held for engine in self._since(name, after_seconds))

    def _since(self, name: str, after_seconds: float) -> Iterator[Bytes]:
        return (s.engines[name] for s in self.samples if s.at_seconds >= after_seconds)


def _bytes(owners: Sequence[OwnerSnapshot]) -> Bytes:
    """Return the sum over the ranks of an engine."""
    ready = sum(owner.ready_bytes for owner in owners)
    # The scheduler writes used bytes, the worker held bytes. If they disagree for a moment, trust held bytes.
    used = min(ready, sum(owner.used_bytes for owner in owners))
    cached = min(ready - used, sum(owner.cached_bytes for owner in owners))
    return Bytes(used, cached, ready - used - cached, sum(owner.limit_bytes for owner in owners))
