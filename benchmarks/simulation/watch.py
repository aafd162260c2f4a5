"""Samples of all owners at regular instants, and the figures computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulation.clockwork import Process, World
from benchmarks.simulation.owner import GRANULE_BYTES, Owner
from kvcached_core.ledger.file.storage import LedgerFile

SAMPLE_SECONDS = 0.005


class Episode(NamedTuple):
    """A time in which an owner was refused memory and had less than its share, which may rise meanwhile.

    `delay_seconds` is the longest time from an instant in it until the owner has the share of that instant.
    """

    owner: int
    begin_seconds: float
    seconds: float
    delay_seconds: float
    ended: bool  # False: the episode lasted to the end of the simulation


class Series(NamedTuple):
    """All samples, in granules: a row for each instant and, except in `times`, a column for each owner."""

    seconds: Any
    ready: Any
    needed: Any  # true demand of running and waiting requests
    cached: Any  # held, but used by no request
    short: Any  # whether the owner's latest lease was partly refused
    edits: Any  # number of driver calls since the beginning
    queued: Any  # number of waiting requests
    finished: Any  # number of finished requests since the beginning


class Watch:
    """Samples all owners every few milliseconds of the simulated clock."""

    def __init__(self, world: World, owners: Sequence[Owner]) -> None:
        self._world, self._owners, self._begin = world, owners, world.now
        self._file = LedgerFile(Path(owners[0].account.ledger_path))
        self._seconds: list[float] = []
        self._rows: list[list[tuple[int, ...]]] = []
        world.spawn(self._look)

    def series(self) -> Series:
        """Return all samples."""
        rows = np.array(self._rows)
        return Series(np.array(self._seconds), *(rows[:, :, at] for at in range(rows.shape[2])))

    def close(self) -> None:
        """Close the ledger's file."""
        self._file.close()

    def _look(self, process: Process) -> None:
        while True:
            self._seconds.append(self._world.now - self._begin)
            self._rows.append([self._see(owner) for owner in self._owners])
            process.sleep(SAMPLE_SECONDS)

    def _see(self, owner: Owner) -> tuple[int, ...]:
        ready, queue = owner.account.ready_bytes // GRANULE_BYTES, owner.queue
        return (
            ready,
            owner.demand_granules(),
            ready - owner.granules.busy,
            self._file.get(owner.account.slot, "demand_bytes") > 0,
            owner.driver.calls,
            len(queue.waiting),
            queue.finished,
        )


def episodes(series: Series, line: Any, tolerated: float) -> list[Episode]:
    """Return the episodes in which an owner was refused and more than `tolerated` granules below its share.

    `line` holds the share (or floor) of each owner at each instant.
    """
    found = []
    low = (series.short > 0) & (series.ready < line - tolerated)
    for owner in range(low.shape[1]):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], low[:, owner].astype(int), [0]))))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            last = min(end, len(low) - 1)
            times = series.seconds[begin : last + 1]
            delay = _delay(
                times, series.ready[begin : last + 1, owner] + tolerated, line[begin : last + 1, owner]
            )
            since = float(times[0])
            found.append(Episode(owner, since, float(times[-1]) - since, delay, bool(end < len(low))))
    return found


def _delay(times: Any, held: Any, line: Any) -> float:
    """Return the longest time until an owner holds its share of an instant, or until the end."""
    longest = 0.0
    for at in range(len(times)):
        there = held[at:] >= np.minimum(line[at], line[at:])
        until = at + int(np.argmax(there)) if there.any() else len(times) - 1
        longest = max(longest, float(times[until] - times[at]))
    return longest


def shortfall(series: Series, line: Any) -> Any:
    """Return by how many granules all owners together are below `line` at each instant."""
    return np.maximum(0.0, line - series.ready).sum(axis=1)


def settled(series: Series, changes: Sequence[float], seconds: float) -> Any:
    """Return for each instant whether the latest change was at least `seconds` ago."""
    latest = np.array(changes)[np.searchsorted(changes, series.seconds, side="right") - 1]
    return series.seconds - latest >= seconds
