"""Granules that a plan has let go and that running kernels may still use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import takewhile

from kvcached_core.driver.base import Driver, Fence
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.arenas import Arenas


class DeferredUnmap:
    """Mapped granules, each unmapped once its fences have passed (I6). The caller holds the pool's lock."""

    def __init__(self, driver: Driver, arenas: Arenas, vacated: Callable[[int], None]) -> None:
        """Call `vacated` with each granule that was unmapped."""
        self._driver = driver
        self._arenas = arenas
        self._vacated = vacated
        # Oldest first. A granule may be unmapped once all its fences have passed.
        self._fences: OrderedDict[int, tuple[Fence, ...]] = OrderedDict()
        self._passed: tuple[Fence, ...] = ()  # the last fences that were seen to have passed

    def __len__(self) -> int:
        return len(self._fences)

    def __contains__(self, granule: int) -> bool:
        return granule in self._fences

    def granules(self) -> frozenset[int]:
        """Return the granules that wait."""
        return frozenset(self._fences)

    def add(self, granules: Iterable[int], streams: Iterable[int]) -> None:
        """Unmap granules once the work that is queued on these streams so far is complete."""
        fences = tuple(self._driver.record(stream) for stream in streams)
        for granule in granules:
            self._fences[granule] = fences

    def cancel(self, granule: int) -> bool:
        """Keep a granule mapped, contents as they are; return False if it does not wait."""
        return self._fences.pop(granule, None) is not None

    def withdraw(self, most: int = 1) -> list[Handles]:
        """Unmap the oldest granule, with the granules of its row that came with it, `most` in all.

        Returns their handles; none if no granule waits or kernels may still use the oldest.
        """
        if not self._fences:
            return []
        first, fences = next(iter(self._fences.items()))
        if fences is not self._passed:
            if not all(self._driver.passed(fence) for fence in fences):
                return []
            self._passed = fences
        came_with = takewhile(lambda item: item[1] is fences, self._fences.items())
        count = self._arenas.row((granule for granule, _ in came_with), most)
        withdrawn = self._arenas.unmap(first, count)
        for granule in range(first, first + count):
            del self._fences[granule]
            self._vacated(granule)
        return withdrawn
