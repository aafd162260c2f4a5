"""Granules that a plan has unmapped and that running kernels may still use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import takewhile

from kvcached_core.driver.base import Driver, Fence
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.arenas import Arenas


class DeferredUnmap:
    """Mapped granules, each unmapped once its fences have passed (I6). Not locked: its owner is."""

    def __init__(self, driver: Driver, arenas: Arenas, vacated: Callable[[int], None]) -> None:
        """`vacated` is told of each granule that was unmapped."""
        self._driver = driver
        self._arenas = arenas
        self._vacated = vacated
        self._fences: OrderedDict[int, tuple[Fence, ...]] = (
            OrderedDict()
        )  # oldest first; all must have passed
        self._passed: tuple[Fence, ...] = ()  # as seen last

    def __len__(self) -> int:
        return len(self._fences)

    def __contains__(self, granule: int) -> bool:
        return granule in self._fences

    def granules(self) -> frozenset[int]:
        """Return what waits."""
        return frozenset(self._fences)

    def add(self, granules: Iterable[int], streams: Iterable[int]) -> None:
        """Let granules wait for all that these streams have been given so far."""
        fences = tuple(self._driver.record(stream) for stream in streams)
        for granule in granules:
            self._fences[granule] = fences

    def cancel(self, granule: int) -> bool:
        """Make a granule an ordinary one again, as it is; False if it is not here."""
        return self._fences.pop(granule, None) is not None

    def withdraw(self, most: int = 1) -> list[Handles]:
        """Unmap the oldest granule, and those of its row that came with it, `most` in all.

        Returns their handles; none if nothing waits or kernels may use it.
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
