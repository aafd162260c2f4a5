"""The arbiter: it decides which engines give memory back, and writes that into their slots.

No process is dedicated to this. A worker whose lease gets less than it may have computes the shares, under
the lock, and asks the engines above their shares to give memory back. Such a reclaim lapses after a second
unless it is repeated; a living worker repeats it as long as it waits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvcached_core.hooks import hookimpl, plugin_manager
from kvcached_core.ledger.file.doorbells import ring
from kvcached_core.ledger.file.runtime import DeviceFolder
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.policy import shares
from kvcached_core.ledger.policy.shares import Claim, Reclaim, Share

_log = logging.getLogger(__name__)

FRESH_MS = 1000  # demand lapses if it is not repeated: its owner is stopped, or wants nothing any more


class LeastRecentlyBusy:
    """The built-in order: engines that have been idle longest give first.

    Busy engines follow, the one farthest above its share first.
    """

    @hookimpl
    def kvcached_givers(self, claims: Sequence[Claim], shares: Mapping[int, Share]) -> Sequence[int]:
        """Return all slots in that order."""

        def rank(claim: Claim) -> tuple[bool, float]:
            if claim.idle_since_ms:
                return False, claim.idle_since_ms
            return True, -(claim.leased - shares[claim.slot].fair) / claim.weight

        return [claim.slot for claim in sorted(claims, key=rank)]


@dataclass(frozen=True)
class DeviceClaims:
    """All claims on a device, and the bytes left to lease: negative if outsiders took promised memory."""

    all: tuple[Claim, ...]
    unleased: int

    @cached_property
    def shares(self) -> dict[int, Share]:
        """The shares of all memory that can be leased, without the memory that starting engines wait for.

        Computed only if somebody waits.
        """
        total = sum(claim.leased - claim.starting for claim in self.all) + self.unleased
        return shares.shares(self.all, max(0, total))

    def claim(self, slot: int) -> Claim:
        return next(claim for claim in self.all if claim.slot == slot)

    def replaced(self, changed: Claim, unleased: int) -> DeviceClaims:
        """Return the claims after one has changed."""
        return DeviceClaims(tuple(changed if c.slot == changed.slot else c for c in self.all), unleased)


def read_claims(rows: Mapping[int, Row], slot: int, want: int, unleased: int, now_ms: int) -> DeviceClaims:
    """Return the claims of all owners; the owner of `slot` wants `want` bytes more."""
    claims = tuple(
        _read(other, row, now_ms, want if other == slot else _fresh_demand(row, now_ms))
        for other, row in rows.items()
    )
    return DeviceClaims(claims, unleased)


def _fresh_demand(row: Row, now_ms: int) -> int:
    fresh = now_ms - row["short_at_ms"] <= FRESH_MS or not writes_minor_1(row)
    return row["demand_bytes"] if fresh else 0


def writes_minor_1(row: Row) -> bool:
    """Return whether the owner of a slot writes the fields of minor 1, and so also reads reclaims."""
    return row["spoken_claim"] == row["claim"]


def _read(slot: int, row: Row, now_ms: int, unmet: int) -> Claim:
    is_minor_1 = writes_minor_1(row)
    needed = row["needed_bytes"] if is_minor_1 else 0
    leased, limit = row["leased_bytes"], row["limit_wanted"]
    granule = max(1, row["granule_bytes"])
    wanted = max(row["wanted_bytes"], needed, leased + unmet if unmet else 0)
    waits_to_start = is_minor_1 and now_ms - row["short_at_ms"] <= FRESH_MS
    return Claim(
        slot, leased,
        # If an engine has not reported needed_bytes, treat everything it wants as needed.
        needed=needed or max(row["used_bytes"], wanted),
        wanted=wanted,
        floor=row["floor_wanted"],
        limit=limit,
        weight=max(1, row["weight_wanted"]),
        unmet=min(unmet, max(0, limit - leased)) // granule * granule,
        active=bool(unmet or row["busy"]),
        kept=is_minor_1 and now_ms < row["kept_until_ms"],
        idle_since_ms=row["idle_since_ms"] if is_minor_1 else 0,
        starting=row["starting_bytes"] if waits_to_start else 0,
        granule=granule,
        reclaimable=is_minor_1,
    )  # fmt: skip


def choose_reclaims(claims: DeviceClaims) -> dict[int, Reclaim]:
    """Return the memory to reclaim from each owner, in the order of the policy; none if nobody waits."""
    if not any(claim.unmet or claim.starting for claim in claims.all):
        return {}
    over = [
        claim for claim in claims.all if claim.reclaimable and claim.leased > claims.shares[claim.slot].fair
    ]
    if not over:
        return {}
    try:
        order = [
            int(slot) for slot in plugin_manager().hook.kvcached_givers(claims=over, shares=claims.shares)
        ]
    except Exception:
        _log.exception("the reclaim policy failed; the built-in one is used")
        order = list(LeastRecentlyBusy().kvcached_givers(over, claims.shares))
    return shares.reclaims(claims.all, claims.shares, claims.unleased, list(dict.fromkeys(order)))


def write_reclaims(file: LedgerFile, rows: Mapping[int, Row], folder: DeviceFolder, claims: DeviceClaims,
                   reclaims: Mapping[int, Reclaim], now_ms: int) -> list[int]:  # fmt: skip
    """Write each owner's target into its slot; ring, and return, the owners that are asked for more than
    before.

    A value is written before its time is prolonged, so no reader goes by an old value longer than it was
    meant to hold. `rows` were read under the lock, which is held.
    """
    rung = []
    for claim in claims.all:
        slot, row, each = claim.slot, rows[claim.slot], reclaims.get(claim.slot, Reclaim(0, 0))
        target = _target(claim.leased, each.give, claim.granule)
        must = _target(claim.leased, each.must, claim.granule)
        lapsed = now_ms >= row["asked_until_ms"]
        before, must_before = (0 if lapsed else row[name] for name in ("target_bytes", "must_bytes"))
        more = _is_more(target, before) or _is_more(must, must_before)
        if target == before == 0 and not row["target_bytes"]:
            continue
        if more and not before:
            file.set(slot, "asked_since_ms", now_ms)  # first: it is read once the target is met
        file.set(slot, "target_bytes", target)
        file.set(slot, "must_bytes", must)
        file.set(slot, "reclaim_bytes", each.give)
        file.set(slot, "asked_until_ms", now_ms + FRESH_MS if target else 0)
        if more:
            if not before:
                file.set(slot, "reclaims", row["reclaims"] + 1)
            rung.append(slot)
            ring(folder.engine_bell(slot))
    return rung


def _is_more(target: int, before: int) -> bool:
    return target > 0 and (not before or target < before)


def _target(leased: int, give: int, granule: int) -> int:
    """Return the bytes to keep: whole granules, at least the one with block 0 (I7); 0 if nothing is given."""
    return max(granule, (leased - give) // granule * granule) if give else 0
