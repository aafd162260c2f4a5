"""What one engine step changes in the memory of its workers."""

from __future__ import annotations

from typing import NamedTuple


class Plan(NamedTuple):
    """Granules to unmap and to map, carried to every rank once and in order by the step message.

    `sequence` counts the plans of an engine from 0. `unmap` and `map` are disjoint granule indices.
    `released` is the number of granules, since the engine began, that the scheduler has let go:
    a worker frees handles until it has freed that many. It only grows, so a plan may be repeated.
    """

    sequence: int
    unmap: tuple[int, ...]
    map: tuple[int, ...]
    released: int
