"""Which granules are empty, the highest first."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class EmptyGranules:
    """Every empty granule is in the heap, once; who ceased to be empty leaves it when it is come upon."""

    def __init__(self, granules: int) -> None:
        self.count = 0  # of empty granules
        self._heap: list[int] = []  # of -g
        self._listed = bytearray(granules)

    def add(self, granule: int) -> None:
        """A granule has become empty."""
        self.count += 1
        if not self._listed[granule]:
            self._listed[granule] = 1
            heappush(self._heap, -granule)

    def remove(self) -> None:
        """One is empty no more, or unmapped."""
        self.count -= 1

    def highest(self, is_empty: Callable[[int], bool]) -> int:
        """Return the highest granule that is still empty, or -1."""
        while self._heap:
            granule = -self._heap[0]
            if is_empty(granule):
                return granule
            heappop(self._heap)
            self._listed[granule] = 0
        return -1

    def listed(self) -> set[int]:
        """Return all that are in the heap; looks at all of it."""
        return {-granule for granule in self._heap}
