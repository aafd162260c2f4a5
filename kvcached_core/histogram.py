"""Histograms of durations, for the ledger and for monitoring, and the two sets of buckets."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True)
class Buckets:
    """A histogram in ledger words: a count for each bound, one for longer durations, and the sum in us."""

    prefix: str  # of the words' names
    bounds_us: tuple[int, ...]  # a bucket counts durations up to its bound and above the one before

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The names of the ledger words, in order."""
        bounded = (f"{self.prefix}_to_{bound}us" for bound in self.bounds_us)
        return (*bounded, f"{self.prefix}_longer", f"{self.prefix}_us")

    def index_of(self, took_us: int) -> int:
        """Return the index of the word that counts a duration."""
        return bisect.bisect_left(self.bounds_us, took_us)


# Mapping a granule is one driver call of tens of microseconds or, with a page in each layer, a hundred.
MAP_BUCKETS = Buckets("maps", (20, 50, 100, 200, 500, 1_000, 5_000, 20_000))
# A reclaim is a step of the engine or a wake-up, then unmapping and freeing; after 300 ms floors preempt.
RECLAIM_BUCKETS = Buckets("reclaims", (5_000, 10_000, 20_000, 50_000, 100_000, 300_000, 1_000_000, 5_000_000))


class Histogram:
    """Counts durations in memory. One thread at a time adds; any thread may read."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._words = [0] * len(buckets.words)

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a duration `times` times."""
        took_us = max(0, round(seconds * 1e6))
        self._words[self._buckets.index_of(took_us)] += times
        self._words[-1] += times * took_us

    def words(self) -> tuple[int, ...]:
        """Return the values of the ledger words, in order."""
        return tuple(self._words)


class HistogramReading(NamedTuple):
    """A histogram as read from the ledger. The last of `counts` is for durations above all bounds."""

    bounds_seconds: tuple[float, ...]
    counts: tuple[int, ...]
    sum_seconds: float

    @classmethod
    def of(cls, buckets: Buckets, words: Sequence[int]) -> HistogramReading:
        """Convert the values of a histogram's ledger words."""
        return cls(tuple(bound / 1e6 for bound in buckets.bounds_us), tuple(words[:-1]), words[-1] / 1e6)

    @property
    def total(self) -> int:
        """The number of durations counted."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """Return the count of durations up to each bound, as Prometheus writes it; the last bound is +Inf."""
        bounds = [*map(str, self.bounds_seconds), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self.counts), strict=True))
