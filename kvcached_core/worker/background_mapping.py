"""Mapping and unmapping off the step path: deferred granules are unmapped, spare ones premapped."""

from __future__ import annotations

from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.deferred_unmap import DeferredUnmap
from kvcached_core.worker.handle_growth import SLICE_GRANULES
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.pool_lock import PoolLock
from kvcached_core.worker.premapped import Premapped

MAX_PREMAPPED_GRANULES = 128  # more than a step maps; beyond it, memory would be kept from other engines


class BackgroundMapping:
    """Maps and unmaps for the supply thread, which holds the pool's lock for one row at a time."""

    def __init__(
        self,
        handles: HandlePool,
        arenas: Arenas,
        premapped: Premapped,
        deferred: DeferredUnmap,
        lock: PoolLock,
        row_granules: int,
    ) -> None:
        """Work for one pool, whose parts these are; `row_granules` are mapped or unmapped in one call."""
        self._handles = handles
        self._arenas = arenas
        self._premapped = premapped
        self._deferred = deferred
        self._lock = lock
        self._row_granules = row_granules

    def unmap_deferred(self) -> int:
        """Unmap a slice of the granules that no kernel can use any more, oldest first.

        Also unmaps premapped granules if too few are spare for those owed. Returns how many still wait.
        """
        waiting = done = 0
        while done < SLICE_GRANULES:
            with self._lock.after_steps():
                is_short = self._handles.owed > len(self._handles.spare) + self._handles.cleaning
                withdrawn = self._deferred.withdraw(self._row_granules)
                withdrawn = withdrawn or (self._premapped.withdraw() if is_short else [])
                waiting = len(self._deferred) + (len(self._premapped) if is_short else 0)
                if not withdrawn:
                    break
                granules = [part for handles in withdrawn for part in self._arenas.split(handles)]
                self._handles.cleaning += len(granules)
            self._handles.put(granules, clean=not is_short)  # memory that is freed next need not be clean
            done += len(withdrawn)
        return waiting

    def premap(self) -> bool:
        """Map spare handles where the next plans are likely to need them: lowest granules first.

        A step then finds its granules mapped. Returns whether there may be more to map. Raises what the
        driver raises; no handle is lost then.
        """
        if not self._handles.is_reported:
            return False  # I2: a granule that the ledger does not count as ready is not mapped
        done = 0
        while done < SLICE_GRANULES:
            with self._lock.after_steps():
                room = MAX_PREMAPPED_GRANULES - len(self._premapped)
                row = self._premapped.vacant_row(min(self._row_granules, room, len(self._handles.spare)))
                if not row or self._handles.owed or self._handles.asleep or self._arenas.is_warming_up:
                    return False
                granules = self._handles.take(len(row))
                try:
                    self._premapped.map(row.start, granules)
                except BaseException:
                    if row.start not in self._premapped:
                        self._handles.spare.extendleft(reversed(granules))
                    raise
            done += len(row)
        return True
