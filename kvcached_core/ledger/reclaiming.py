"""The room a device has for one worker, and reclaims: requests to other engines to give memory back."""

from __future__ import annotations

from collections.abc import Mapping

from kvcached_core.ledger.file.layout import UNWRITTEN
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.membership import Membership
from kvcached_core.ledger.owned_slot import ring_waiting
from kvcached_core.ledger.policy import arbiter, grant


def room_for(member: Membership, file: LedgerFile, rows: Mapping[int, Row], free_bytes: int) -> grant.Room:
    """Return the room for this worker; none while a living owner has yet to write its slot."""
    leased, limit = member.own["leased_bytes"], member.own["limit_applied"]
    if any(row["claim"] == UNWRITTEN for row in rows.values()):
        ring_waiting(member.folder, file, member.slot.index)
        return grant.Room(limit - leased, 0, 0)
    promises = [grant.Promise(*map(row.__getitem__, grant.Promise._fields)) for row in rows.values()]
    return grant.room(leased, limit, promises, member.capacity_bytes, member.headroom_bytes, free_bytes)


def reclaim(member: Membership, file: LedgerFile, rows: Mapping[int, Row], claims: arbiter.DeviceClaims,
            now_ms: int) -> int:  # fmt: skip
    """Ask engines above their share to give memory back, if anybody waits; cancel earlier reclaims if not.

    Returns the bytes that others are asked for. The lock is held.
    """
    reclaims = arbiter.choose_reclaims(claims)
    for index in arbiter.write_reclaims(file, rows, member.folder, claims, reclaims, now_ms):
        member.reporter.report(
            "reclaim", locked=True, slot=index, name=file.get_text(index, "name"), taker=member.name,
            **{field: file.get(index, field) for field in ("target_bytes", "must_bytes", "leased_bytes")},
        )  # fmt: skip
    return sum(each.give for each in reclaims.values())
