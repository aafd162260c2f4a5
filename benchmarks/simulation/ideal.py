"""Compute the ideal shares from the demand at each instant, by bisection, for all instants at once.

It shares nothing with the arbiter's arithmetic but the definition: floors first, then max-min by weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_HALVINGS = 48


def fill(total: float, low: Any, high: Any, weight: Any) -> Any:
    """Return clamp(level * weight, low, high), with the level at which each row adds up to `total`.

    `low` and `high` have one row for an instant and one column for an owner; the sum of a row of `low` is
    at most `total`. A row of `high` that fits is returned as it is.
    """
    below = np.zeros(len(high))
    above = np.full(len(high), float(np.max(high / weight)) + 1)
    for _ in range(_HALVINGS):
        level = (below + above) / 2
        over = np.clip(level[:, None] * weight, low, high).sum(axis=1) > total
        above, below = np.where(over, level, above), np.where(over, below, level)
    return np.clip(below[:, None] * weight, low, high)


def shares(total: float, needed: Any, floors: Any, limits: Any, weights: Any) -> Any:
    """Return each owner's ideal share of `total` at each instant; all in granules."""
    need = np.minimum(needed, limits)
    floor = fill(total, np.zeros_like(need), np.minimum(need, floors), weights)
    return fill(total, floor, need, weights)
