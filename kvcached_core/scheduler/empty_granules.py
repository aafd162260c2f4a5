"""Finds the highest empty granule, which is unmapped first."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class EmptyGranules:
    """The empty granules. Each is in the heap once; stale entries are dropped when they reach the top."""

    def __init__(self, granules: int) -> None:
        self.count = 0  # of empty granules
        self._heap: list[int] = []  # of -g
        self._listed = bytearray(granules)

    def add(self, granule: int) -> None:
        """Add a granule that has become empty."""
        self.count += 1
        if not self._listed[granule]:
            self._listed[granule] = 1
            heappush(self._heap, -granule)

    def remove(self) -> None:
        """Count one empty granule less: it was used again or unmapped."""
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
        """Return all granules in the heap, stale ones too. Looks at the whole heap."""
        return {-granule for granule in self._heap}
