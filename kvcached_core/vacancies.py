"""The vacant granules of an arena; the lowest is mapped next."""

from __future__ import annotations

from collections.abc import Container
from heapq import heappop, heappush


class Vacancies:
    """Finds the lowest vacant granule; only `taken()` and `has_duplicates` look at all of them.

    Invariant: a vacant granule is in [_fresh, _end), or it is below _fresh and in the heap once.
    """

    def __init__(self, first: int, end: int) -> None:
        """Start with every granule in [first, end) vacant."""
        self._first = first
        self._fresh = first
        self._end = end
        self._returned: list[int] = []  # the heap

    def take_lowest(self) -> int:
        """Remove the lowest vacant granule and return it; there must be one."""
        if self._returned:
            return heappop(self._returned)
        granule = self._fresh
        self._fresh = granule + 1
        return granule

    def add(self, granule: int) -> None:
        """Make a taken granule vacant again."""
        heappush(self._returned, granule)

    def taken(self) -> list[int]:
        """Return all granules that are not vacant, sorted."""
        return sorted(set(range(self._first, self._fresh)) - set(self._returned))

    @property
    def has_duplicates(self) -> bool:
        """Say whether a granule is in the heap more than once, which breaks the invariant."""
        return len(self._returned) != len(set(self._returned))


class LazyVacancies(Vacancies):
    """Vacancies of an arena in which other code maps granules without telling this object.

    The heap may then hold granules that are mapped; `lowest()` drops them when they reach the top. So
    `lowest()` and `add()` are used here, not `take_lowest()` and `taken()`.
    """

    def __init__(self, first: int, end: int, mapped: Container[int]) -> None:
        """Start with the granules in [first, end) that are not in `mapped`, a container that stays in use."""
        super().__init__(first, end)
        self._mapped = mapped
        self._in_heap: set[int] = set()

    def lowest(self) -> int | None:
        """Return the lowest granule that is not mapped, or None; it stays vacant."""
        mapped = self._mapped
        while self._returned and self._returned[0] in mapped:
            self._in_heap.remove(heappop(self._returned))
        if self._returned:
            return self._returned[0]
        while self._fresh < self._end and self._fresh in mapped:
            self._fresh += 1
        return self._fresh if self._fresh < self._end else None

    def add(self, granule: int) -> None:
        """Note that a granule was unmapped; may be called twice for the same granule."""
        if granule < self._fresh and granule not in self._in_heap:
            self._in_heap.add(granule)
            heappush(self._returned, granule)
