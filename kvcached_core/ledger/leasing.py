"""Leases: a worker asks the ledger for memory, and shows the demand that is left.

Only a lease can promise too much, so only a lease takes the lock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.ledger.applied_controls import AppliedControls
from kvcached_core.ledger.file.layout import UNWRITTEN
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.membership import Membership
from kvcached_core.ledger.owned_slot import ring_waiting, sweep
from kvcached_core.ledger.peers import Peers
from kvcached_core.ledger.policy import arbiter, shares
from kvcached_core.ledger.policy.external_usage import ExternalUsage
from kvcached_core.ledger.reclaiming import reclaim, room_for
from kvcached_core.ledger.start_queue import StartQueue


class Leasing:
    """One worker's leases and its demand. `keep_ms`: how long memory that it waited for is kept for it."""

    def __init__(self, membership: Membership, controls: AppliedControls, queue: StartQueue,
                 keep_ms: int) -> None:  # fmt: skip
        self._membership = membership
        self._own = membership.own
        self._controls = controls
        self._queue = queue
        self._keep_ms = keep_ms
        self._is_short = False  # from a lease that got too little until all that is wanted is there
        self._peers: Peers | None = None
        self._external_usage: ExternalUsage | None = None

    def grow_with(self, ranks: Collection[int]) -> None:
        """Lease in step with the other ranks from now on; see Account.grow_with."""
        if len(ranks) > 1:
            member = self._membership
            self._peers = Peers(member.runtime, member.texts["instance"], self._own["rank"], ranks)

    def close(self) -> None:
        """Close the files of the other ranks; may be repeated."""
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    @property
    def wanted_bytes(self) -> int:
        """Bytes that the scheduler wants leased in all, capped by how far the other ranks are."""
        wanted = self._membership.slot.get("wanted_bytes")
        most = None if self._peers is None else self._peers.most()
        return wanted if most is None else min(wanted, most * self._own["granule_bytes"])

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Promise up to `want_bytes` more; see Account.lease."""
        member = self._membership
        with member.exclusive() as file:
            if self._controls.apply():
                self._controls.report(locked=True)
            file.show_memory(memory)
            if self._own["queued_at_ms"]:  # it grows without having been admitted
                self._queue.leave()
            if UNWRITTEN in file.claims():
                sweep(member.folder, file)
            rows = file.rows()
            self._measure_external_usage(file, rows, memory)
            if any(row["claim"] == UNWRITTEN for row in rows.values()):
                ring_waiting(member.folder, file, member.slot.index)
                self._fall_short(want_bytes)
                return 0
            return self._lease_among_all(file, rows, want_bytes, memory.free_bytes)

    def _measure_external_usage(self, file: LedgerFile, rows: Mapping[int, Row], memory: MemoryInfo) -> None:
        member = self._membership
        usage = self._external_usage = self._external_usage or ExternalUsage()
        has_changed = usage.measure(
            rows.values(), memory, member.device.uuid, member.headroom_bytes, member.now_ms()
        )
        file.set_header("outside_bytes", usage.bytes)
        if has_changed:
            member.reporter.report("outside", locked=True, outside_bytes=usage.bytes,
                                   free_bytes=memory.free_bytes)  # fmt: skip

    def _lease_among_all(self, file: LedgerFile, rows: Mapping[int, Row], want: int, free_bytes: int) -> int:
        """Grant the memory that this worker may have now, and reclaim the rest from other engines."""
        member, own, granule_bytes = self._membership, self._own, self._own["granule_bytes"]
        room, now_ms = room_for(member, file, rows, free_bytes), member.now_ms()
        # A large demand is leased in slices, but other engines see all of it and are asked for all of it.
        demand = max(want, self.wanted_bytes - own["leased_bytes"])
        claims = arbiter.read_claims(rows, member.slot.index, demand, room.of_device, now_ms)
        mine = claims.claim(member.slot.index)
        others = [claim for claim in claims.all if claim.slot != member.slot.index]
        most = min(room.limit_bytes, room.of_device)
        if any(other.unmet or other.starting for other in others):
            granted = shares.grantable(mine, want, most, others, claims.shares)
        else:
            granted = max(0, min(want, most))  # I10: equals grantable() while nobody else waits
        granted = granted // granule_bytes * granule_bytes
        if granted < min(want, room.limit_bytes) and sweep(member.folder, file):
            # The dead hold nothing and wait for nothing.
            return self._lease_among_all(file, file.rows(), want, free_bytes)
        if granted and (self._is_short or granted < want):
            member.put("kept_until_ms", now_ms + self._keep_ms)
        if granted:
            self._promise(granted)
        unmet = max(0, min(demand, room.limit_bytes) - granted) // granule_bytes * granule_bytes
        after = mine._replace(leased=mine.leased + granted, unmet=unmet)
        if after != mine:
            claims = claims.replaced(after, room.of_device - granted)
        coming = min(unmet, reclaim(member, file, rows, claims, now_ms))
        left = demand - granted
        if granted < want:
            self._fall_short(left, now_ms, coming)
        else:
            self._note_demand(left, now_ms, coming=left)  # the next slice is leased at once
        return granted

    def _promise(self, granted: int) -> None:
        member, leased = self._membership, self._own["leased_bytes"] + granted
        member.reporter.report("lease", locked=True, granted_bytes=granted, leased_bytes=leased)
        member.put("leased_bytes", leased)
        member.add("lease_bytes", granted)
        member.add("leases")
        if self._peers is not None:
            self._peers.ring_next()

    def _fall_short(self, unmet: int, now_ms: int = 0, coming: int = 0) -> None:
        member = self._membership
        if not self._is_short:  # once, not at every retry
            member.reporter.report("demand", locked=True, unmet_bytes=unmet,
                                   leased_bytes=self._own["leased_bytes"])  # fmt: skip
        self._is_short = True
        member.add("refusals")
        self._note_demand(unmet, now_ms, coming)

    def refuse(self, unmet_bytes: int) -> None:
        """Record demand that could not be met; 0 if there is none."""
        with self._membership.mutex:
            self._note_demand(unmet_bytes, 0, coming=min(self._own["coming_bytes"], unmet_bytes))

    def _note_demand(self, unmet: int, now_ms: int, coming: int) -> None:
        """Write the demand and the part of it that is coming.

        The part is written before the demand rises and after it ends, so memory on its way never looks
        refused.
        """
        member = self._membership
        if unmet and now_ms:
            member.put("short_at_ms", now_ms)
        self._is_short &= unmet > 0
        fields = [("coming_bytes", coming), ("demand_bytes", unmet)]
        for name, value in fields if unmet else reversed(fields):
            if self._own[name] != value:
                member.put(name, value)
