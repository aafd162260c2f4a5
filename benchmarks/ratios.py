"""The one place where a ratio is computed from raw samples; writer and checker both call it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "min": min,
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
