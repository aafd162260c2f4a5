"""Carries out plans: which granules a plan cancels, claims, maps and unmaps later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from kvcached_core.errors import InvariantError
from kvcached_core.plan import Plan
from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.deferred_unmap import DeferredUnmap
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.handle_source import HandleSource
from kvcached_core.worker.premapped import Premapped


class PlanRunner:
    """Carries out each plan once and in order. The caller holds the pool's `changed`."""

    def __init__(
        self,
        handles: HandlePool,
        arenas: Arenas,
        premapped: Premapped,
        deferred: DeferredUnmap,
        source: HandleSource,
        row_granules: int,
    ) -> None:
        """Work for one pool, whose parts these are; `row_granules` are mapped in one call."""
        self._handles = handles
        self._arenas = arenas
        self._premapped = premapped
        self._deferred = deferred
        self._source = source
        self._row_granules = row_granules
        self._next_sequence = 0
        self._attempted = -1  # the sequence of a plan that failed half-way

    def is_new(self, plan: Plan) -> bool:
        """Say whether a plan has not been carried out yet. Raises InvariantError unless it is legal."""
        if plan.sequence < self._next_sequence:
            return False
        if plan.sequence > self._next_sequence:
            raise InvariantError(f"plan {plan.sequence} came, {self._next_sequence} was expected")
        again = plan.sequence == self._attempted
        firsts, count = self._arenas.firsts, self._arenas.count
        bad_unmap = [g for g in plan.unmap if g in firsts or not (self.is_live(g) or again)]
        bad_map = [g for g in plan.map if not 0 <= g < count or self.is_live(g)]
        twice = len({*plan.unmap, *plan.map}) < len(plan.unmap) + len(plan.map)
        if bad_unmap or bad_map or twice:
            raise InvariantError(f"{plan} is not legal: unmap {bad_unmap}, map {bad_map} of {count} granules")
        return True

    def run(self, plan: Plan, streams: Sequence[int]) -> None:
        """Carry out a plan whose step runs on the first of `streams`.

        After an error the same plan may be run again: granules to unmap may wait for their fences already,
        and no granule that the plan maps is left mapped.
        """
        self._attempted = plan.sequence
        if plan.unmap:
            self.unmap_later(plan.unmap, streams)
        self._map(plan.map, streams)
        self._handles.release_target = max(self._handles.release_target, plan.released)
        self._next_sequence = plan.sequence + 1

    def is_live(self, granule: int) -> bool:
        """Say whether a plan has mapped a granule and none has unmapped it since."""
        return (
            granule in self._arenas.mapped
            and granule not in self._deferred
            and granule not in self._premapped
        )

    def unmap_later(self, granules: Iterable[int], streams: Iterable[int]) -> None:
        """Unmap the live ones of these granules once the work queued on `streams` is complete."""
        self._deferred.add([granule for granule in granules if self.is_live(granule)], streams)

    def _map(self, granules: Sequence[int], streams: Sequence[int]) -> None:
        """Make granules live, all or none; later work on the first stream reads zeros in them.

        Steps on the other streams may still use pages of earlier plans.
        """
        with ExitStack() as undo:
            # Granules that are mapped already come first: their handles must not be taken for the others.
            # A canceled unmap leaves finite old values, as in a block that was used before.
            revived = [granule for granule in granules if self._deferred.cancel(granule)]
            if revived:
                undo.callback(self.unmap_later, revived, streams)
            claimed = self._premapped.claim(granules, streams[0])
            if claimed:
                undo.callback(self.unmap_later, claimed, streams)
            there = {*revived, *claimed}
            missing = [granule for granule in granules if granule not in there]
            while missing:
                count = self._arenas.row(missing, self._row_granules)
                self._source.map(missing[0], count, streams[0])
                undo.callback(self.unmap_later, missing[:count], streams)
                del missing[:count]
            undo.pop_all()
