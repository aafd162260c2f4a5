"""Ranks of one engine on several devices grow together: none gets far ahead of the others.

An engine can use what its poorest rank holds. If its ranks leased as they please, two engines on the same
devices could each hold most of one and wait for the other's. So the ranks stand in one order, that of their
devices, which is the same for all engines: the first leads by a slice at most, each other one follows the one
before it. What is decided on the first device is decided for all (Coffman's circular wait cannot arise), and
what a refused follower leaves unused on the devices before it is a slice. That holds among the ranks of one
machine; a rank of several machines that is ahead gives what others ask of it first (`Desk`).
"""

from __future__ import annotations

from collections.abc import Collection

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.slots import LocalSlot, find_places

LEAD_GRANULES = 32


class Peers:
    """The other ranks of an engine, as one of its workers sees them. Numbers are granules."""

    def __init__(self, runtime: Runtime, instance: str, rank: int, ranks: Collection[int]) -> None:
        """Find them. Raises LedgerError naming those that are missing."""
        self._runtime, self._instance, self._rank = runtime, instance, rank
        self._ranks = set(ranks)
        self._order: list[LocalSlot] = []
        self._at = 0
        self._find()

    def most(self) -> int | None:
        """Return how much this rank may lease in all; None while the others cannot be seen."""
        if not all(place.is_there() for place in self._order):
            try:
                self._find()
            except LedgerError:
                return None  # the ledger is being made again, or a rank has died, and the engine with it
        if self._at:
            return self._leased(self._order[self._at - 1])
        others = self._order[1:]
        return min(map(self._leased, others)) + LEAD_GRANULES if others else None

    def ring_next(self) -> None:
        """Let the rank that follows this one look: it may lease more now. The last one lets the first."""
        self._order[(self._at + 1) % len(self._order)].ringer.ring()

    def close(self) -> None:
        """Let go of the files."""
        for place in self._order:
            place.close()
        self._order = []

    @staticmethod
    def _leased(place: LocalSlot) -> int:
        return place.words[place.at["leased_bytes"]] // place.granule_bytes

    def _find(self) -> None:
        found = find_places(self._runtime, self._instance, self._ranks)
        self.close()
        self._order = sorted(found.values(), key=lambda place: (str(place.file.path), place.rank))
        self._at = next(at for at, place in enumerate(self._order) if place.rank == self._rank)
