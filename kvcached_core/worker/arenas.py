"""The arenas of one rank. Granules are numbered through: the second arena's follow the first's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvcached_core.driver.base import Driver
from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.histogram import MAP_BUCKETS, Histogram
from kvcached_core.worker.arena import Arena, Handles

if TYPE_CHECKING:
    import torch


class Arenas:
    """One or more arenas with pages of one size. A granule has as many handles as its arena has segments.

    The ledger counts granules of `pages_per_ledger_granule` handles each; a granule here is one or several.
    """

    def __init__(
        self,
        driver: Driver,
        page_bytes: int,
        pages_per_ledger_granule: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._driver = driver
        self._page_bytes = page_bytes
        self._pages_per_ledger_granule = pages_per_ledger_granule
        self._arenas: list[Arena] = []
        self._geometries: list[Geometry] = []
        self.firsts: list[int] = []  # the first granule of each arena, which stays mapped
        self.count = 0  # granules of all arenas
        self.mapped: dict[int, Handles] = {}
        self.mapped_ledger_granules = self.maps = self.unmaps = 0
        self.map_times = Histogram(MAP_BUCKETS)
        self._clock = clock

    def add(self, geometry: Geometry, size_bytes: int | None) -> int:
        """Reserve another arena, with nothing mapped, and return the number of its first granule.

        Raises InvariantError if its granules are not whole granules of the ledger.
        """
        pages = len(geometry.starts)
        if geometry.page_bytes != self._page_bytes or pages % self._pages_per_ledger_granule:
            raise InvariantError(
                f"granules of {pages} pages of {geometry.page_bytes} bytes are not whole ledger granules "
                f"of {self._pages_per_ledger_granule} pages of {self._page_bytes} bytes"
            )
        end = max(geometry.starts) + geometry.block_count * geometry.stride_bytes
        self._arenas.append(Arena(self._driver, geometry, size_bytes or end, self.count, self.mapped))
        self._geometries.append(geometry)
        self.firsts.append(self.count)
        self.count += geometry.granule_count
        return self.firsts[-1]

    def drop_last(self) -> None:
        """Return the addresses of the arena that was added last; nothing in it may be mapped."""
        self._arenas.pop().close()
        self.count -= self._geometries.pop().granule_count
        self.firsts.pop()

    @property
    def is_warming_up(self) -> bool:
        """Say whether scratch memory is behind the granules that are not mapped."""
        return any(arena.is_warming_up for arena in self._arenas)

    def tensor(self) -> torch.Tensor:
        """Return the tensor over the arena that was added last."""
        return self._arenas[-1].tensor()

    def ledger_granules(self, granule: int) -> int:
        """Return how many granules of the ledger one granule is."""
        return len(self._geometries[self._at(granule)].starts) // self._pages_per_ledger_granule

    def split(self, handles: Handles) -> list[Handles]:
        """Split a granule's handles by granules of the ledger."""
        size = self._pages_per_ledger_granule
        return [handles[at : at + size] for at in range(0, len(handles), size)]

    def map(self, first: int, granules: Sequence[Handles], stream: int) -> None:
        """Map a row of granules of one arena, all or none; later work on `stream` reads zeros in them.

        `granules` are the handles of granule `first`, of the next one and so on.
        """
        at, begun, count = self._at(first), self._clock(), len(granules)
        self._arenas[at].map(first, granules, stream)
        self.map_times.add((self._clock() - begun) / count, count)
        self.mapped_ledger_granules += count * self.ledger_granules(first)
        self.maps += count

    def unmap(self, first: int, count: int = 1) -> list[Handles]:
        """Unmap a row of granules of one arena, all or none, and return their handles.

        No kernel may use them any more.
        """
        granules = self._arenas[self._at(first)].unmap(first, count)
        self.mapped_ledger_granules -= count * self.ledger_granules(first)
        self.unmaps += count
        return granules

    def row(self, granules: Iterable[int], most: int) -> int:
        """Return how many of these granules, from the first and `most` at most, are a row in one arena."""
        count, last = 0, -1
        for granule in granules:
            if count == most or (count and (granule != last + 1 or granule in self.firsts)):
                break
            count, last = count + 1, granule
        return count

    def alias_all(self) -> None:
        """Put scratch memory behind all granules that are not mapped."""
        with ExitStack() as undo:
            for arena in self._arenas:
                arena.alias_all()
                undo.callback(arena.unalias)
            undo.pop_all()

    def unalias(self) -> None:
        """Unmap the scratch memory and free it. May be repeated."""
        self._all(Arena.unalias)

    def close(self) -> None:
        """Return the addresses; everything must be unmapped and the tensors unused from now on."""
        self._all(Arena.close)

    def _all(self, call: Callable[[Arena], None]) -> None:
        with ExitStack() as steps:
            for arena in self._arenas:
                steps.callback(call, arena)

    def _at(self, granule: int) -> int:
        if granule < 0:
            raise InvariantError(f"there is no granule {granule}")
        ends = itertools.accumulate(geometry.granule_count for geometry in self._geometries)
        for at, end in enumerate(ends):
            if granule < end:
                return at
        raise InvariantError(f"there is no granule {granule}, but {self.count}")
