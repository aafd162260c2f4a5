"""Granules that are mapped and zeroed before a plan asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcached_core.driver.base import Driver, Fence
from kvcached_core.vacancies import LazyVacancies
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.arenas import Arenas


@dataclass(slots=True, eq=False)
class _Row:
    """Granules that were zeroed in one call, the `number`th of them."""

    number: int
    fence: Fence | None = None  # after the zeroing; None until it is recorded


class Premapped:
    """Maps the lowest vacant granule early, on the guess that the scheduler maps it next.

    A wrong guess costs one unmap later. Premapped granules are mapped in the arena, and no kernel but their
    zeroing has touched them. The caller holds the pool's lock.
    """

    def __init__(self, driver: Driver, arenas: Arenas, first: int, end: int) -> None:
        """Start with granules [first, end) vacant; lower granules stay mapped."""
        self._driver = driver
        self._arenas = arenas
        self._zeroed: dict[int, _Row] = {}
        self._rows = 0  # mapped so far
        self._vacancies = LazyVacancies(first, end, arenas.mapped)
        self._end = end

    def __len__(self) -> int:
        return len(self._zeroed)

    def __contains__(self, granule: int) -> bool:
        return granule in self._zeroed

    def granules(self) -> frozenset[int]:
        """Return the premapped granules."""
        return frozenset(self._zeroed)

    def map(self, first: int, granules: Sequence[Handles]) -> None:
        """Map a row of vacant granules and queue their zeroing; raises what the driver raises.

        If the mapping failed nothing has changed. If only the fence failed, the granules are premapped all
        the same: their zeroing may be running, and claim() or withdraw() records the missing fence.
        """
        self._arenas.map(first, granules, self._driver.own_stream())
        self._rows += 1
        row = _Row(self._rows)
        self._zeroed.update(dict.fromkeys(range(first, first + len(granules)), row))
        self._fence(row)

    def claim(self, granules: Iterable[int], stream: int) -> list[int]:
        """Hand the premapped ones of these granules to a plan and return them; later work on `stream` reads
        zeros in them. If the driver fails nothing has changed.
        """
        claimed = [granule for granule in granules if granule in self._zeroed]
        if claimed:
            # Rows are zeroed in order, so one fence after the latest row covers all of them.
            fence = self._fence(max((self._zeroed[g] for g in claimed), key=lambda row: row.number))
            if not self._driver.passed(fence):
                self._driver.follow(stream, fence)
        for granule in claimed:
            del self._zeroed[granule]
        return claimed

    def withdraw(self) -> list[Handles]:
        """Unmap the highest granule, which the scheduler maps last, and return its handles.

        Returns nothing if there is none, or while it is being zeroed.
        """
        if not self._zeroed:
            return []
        granule = max(self._zeroed)
        if not self._driver.passed(self._fence(self._zeroed[granule])):
            return []
        withdrawn = self._arenas.unmap(granule)
        del self._zeroed[granule]
        self.vacated(granule)
        return withdrawn

    def forget(self, granule: int) -> None:
        """Count a granule as no longer premapped; it stays mapped."""
        self._zeroed.pop(granule, None)

    def vacated(self, granule: int) -> None:
        """Note that a granule was unmapped."""
        self._vacancies.add(granule)

    def vacant_row(self, most: int) -> range:
        """Return up to `most` granules in a row that are not mapped, beginning with the lowest of all."""
        first = self.lowest_vacant()
        if first is None:
            return range(0)
        end = min(first + most, self._end)
        return range(first, next((g for g in range(first, end) if g in self._arenas.mapped), end))

    def lowest_vacant(self) -> int | None:
        """Return the lowest granule that is not mapped, or None."""
        return self._vacancies.lowest()

    def _fence(self, row: _Row) -> Fence:
        """Return a fence after a row's zeroing."""
        if row.fence is None:
            row.fence = self._driver.record(self._driver.own_stream())
        return row.fence
