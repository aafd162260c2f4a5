"""How long it takes: counts by bucket, for the ledger and for monitoring. The sets of buckets are here."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True)
class Buckets:
    """A histogram in words of a slot: a count for each bound, one for what took longer, and the sum in us."""

    what: str
    bounds_us: tuple[int, ...]  # a bucket counts what took at most its bound and more than the one before

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The names of its words, in their order."""
        bounded = (f"{self.what}_to_{bound}us" for bound in self.bounds_us)
        return (*bounded, f"{self.what}_longer", f"{self.what}_us")

    def at(self, took_us: int) -> int:
        """Return the place of the bucket for a duration."""
        return bisect.bisect_left(self.bounds_us, took_us)


# A granule is one driver call of tens of microseconds or, with a page in each layer, a hundred of them.
MAP_BUCKETS = Buckets("maps", (20, 50, 100, 200, 500, 1_000, 5_000, 20_000))
# A step of the engine, or a wake-up, then unmapping and freeing; 300 ms is when floors begin to preempt.
RECLAIM_BUCKETS = Buckets("reclaims", (5_000, 10_000, 20_000, 50_000, 100_000, 300_000, 1_000_000, 5_000_000))


class Histogram:
    """Counts durations in memory. One thread at a time adds; anybody may read."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._words = [0] * len(buckets.words)

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a duration that was seen so many times."""
        took_us = max(0, round(seconds * 1e6))
        self._words[self._buckets.at(took_us)] += times
        self._words[-1] += times * took_us

    def words(self) -> tuple[int, ...]:
        """Return the values of the words."""
        return tuple(self._words)


class HistogramReading(NamedTuple):
    """A histogram as it was read. `counts` has one more than `bounds_seconds`: what took longer."""

    bounds_seconds: tuple[float, ...]
    counts: tuple[int, ...]
    sum_seconds: float

    @classmethod
    def of(cls, buckets: Buckets, words: Sequence[int]) -> HistogramReading:
        """Read the values of a histogram's words."""
        return cls(tuple(bound / 1e6 for bound in buckets.bounds_us), tuple(words[:-1]), words[-1] / 1e6)

    @property
    def total(self) -> int:
        """How many were timed."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """Return the count of those up to each bound, as Prometheus writes it; the last bound is +Inf."""
        bounds = [*map(str, self.bounds_seconds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))
