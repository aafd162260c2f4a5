"""Statistics of samples, shared by the benchmarks, the checker of their results and the demo."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the least value that at least `percent` % of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "min": min,
    "p99": partial(percentile, percent=99),
}


def ratio(numerator: Sequence[float], denominator: Sequence[float], statistic: str) -> float:
    """Return statistic(numerator) / statistic(denominator).

    Raises ValueError for an unknown statistic, an empty sample or a denominator of zero.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic {statistic!r}: expected one of {', '.join(STATISTICS)}")
    if not numerator or not denominator:
        raise ValueError("a ratio of an empty sample")
    below = STATISTICS[statistic](denominator)
    if below == 0:
        raise ValueError("a ratio over zero")
    return STATISTICS[statistic](numerator) / below


class Rounds(NamedTuple):
    """Ratios of paired rounds; `error` is the standard error of their mean."""

    ratios: list[float]
    mean: float
    error: float


def pairwise(numerator: Sequence[float], denominator: Sequence[float]) -> Rounds:
    """Compare two samples round by round.

    Raises ValueError if their lengths differ, and StatisticsError if they are empty.
    """
    ratios = [above / below for above, below in zip(numerator, denominator, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
    return Rounds(ratios, statistics.mean(ratios), error)
