"""The plan of a step: which granules the workers map, unmap and free."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """Granules to unmap and to map. The step message carries it to every rank once and in order.

    `sequence` counts the plans of an engine from 0. `unmap` and `map` are disjoint granule indices.
    `released` is how many granules the scheduler has released since the engine began: a worker frees handles
    until it has freed that many. It only grows, so a plan may be repeated.
    """

    sequence: int
    unmap: tuple[int, ...]
    map: tuple[int, ...]
    released: int
