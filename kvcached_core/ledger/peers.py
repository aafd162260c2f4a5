"""Keep the ranks of one engine in step: on several devices, none leases far more than the others.

An engine can use only as many granules as its poorest rank holds. If its ranks leased freely, two engines on
the same devices could each hold most of one device and wait for the other's. So an engine's ranks lease in
the order of their devices, which is the same for all engines: the first rank leads by a slice at most, and
each other rank follows the one before it. The first device decides for all, so no circle of waiting can arise
(Coffman's circular wait), and a follower that is refused leaves at most a slice unused on the devices before
its own. This holds among the ranks of one machine; a rank that is ahead of the ranks on another machine gives
its surplus to a reclaim first (`SchedulerView`).
"""

from __future__ import annotations

from collections.abc import Collection

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.slots import LocalSlot, find_slots

LEAD_GRANULES = 32


class Peers:
    """The ranks of an engine on this machine, as one of its workers sees them. Counts are granules."""

    def __init__(self, runtime: Runtime, instance: str, rank: int, ranks: Collection[int]) -> None:
        """Find the slots of `ranks`. Raises LedgerError naming the ranks that were not found."""
        self._runtime, self._instance, self._rank = runtime, instance, rank
        self._ranks = set(ranks)
        self._slots: list[LocalSlot] = []
        self._position = 0
        self._find()

    def most(self) -> int | None:
        """Return how many granules this rank may lease in all; None while another slot cannot be read."""
        if not all(slot.is_there() for slot in self._slots):
            try:
                self._find()
            except LedgerError:
                return None  # the ledger is being made again, or a rank has died, and the engine with it
        if self._position:
            return self._leased(self._slots[self._position - 1])
        others = self._slots[1:]
        return min(map(self._leased, others)) + LEAD_GRANULES if others else None

    def ring_next(self) -> None:
        """Ring the rank that follows this one: it may lease more now. The last rank wakes the first."""
        self._slots[(self._position + 1) % len(self._slots)].ringer.ring()

    def close(self) -> None:
        """Close the files."""
        for slot in self._slots:
            slot.close()
        self._slots = []

    @staticmethod
    def _leased(slot: LocalSlot) -> int:
        return slot.words[slot.at["leased_bytes"]] // slot.granule_bytes

    def _find(self) -> None:
        found = find_slots(self._runtime, self._instance, self._ranks)
        self.close()
        self._slots = sorted(found.values(), key=lambda slot: (str(slot.file.path), slot.rank))
        self._position = next(at for at, slot in enumerate(self._slots) if slot.rank == self._rank)
