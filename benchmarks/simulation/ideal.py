"""Compute the ideal shares from the demand at each instant, by bisection, for all instants at once.

This is independent of the arbiter's code. Only the definition is the same: floors first, then max-min
fairness by weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_HALVINGS = 48


def fill(total: float, low: Any, high: Any, weight: Any) -> Any:
    """Return clamp(level * weight, low, high), with the level for which each row adds up to `total`.

    `low` and `high` have a row for each instant and a column for each owner. A row of `low` must add up to at
    most `total`. If a row of `high` does so too, that row is the result.
    """
    below = np.zeros(len(high))
    above = np.full(len(high), float(np.max(high / weight)) + 1)
    for _ in range(_HALVINGS):
        level = (below + above) / 2
        over = np.clip(level[:, None] * weight, low, high).sum(axis=1) > total
        above, below = np.where(over, level, above), np.where(over, below, level)
    return np.clip(below[:, None] * weight, low, high)


def shares(total: float, needed: Any, floors: Any, limits: Any, weights: Any) -> Any:
    """Return each owner's ideal share of `total` at each instant, in granules."""
    need = np.minimum(needed, limits)
    floor = fill(total, np.zeros_like(need), np.minimum(need, floors), weights)
    return fill(total, floor, need, weights)
