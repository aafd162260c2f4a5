"""The arbiter: what is fair is worked out by whoever leases, under the lock, and written into the slots.

There is no process that decides. A lease that gets less than its owner may have asks those who hold more than
they are entitled to; what it asked lapses after a second, unless it asks again, which a living waiter does.
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
from kvcached_core.ledger.policy.shares import Ask, Claim, Share

_log = logging.getLogger(__name__)

FRESH_MS = 1000  # who has not asked for so long is not waited for: it is stopped, or wants nothing any more


class LeastRecentlyBusy:
    """The built-in policy: who is idle for longest gives first; of the busy, who is the farthest above."""

    @hookimpl
    def kvcached_givers(self, claims: Sequence[Claim], shares: Mapping[int, Share]) -> Sequence[int]:
        """Return all slots in that order."""

        def rank(claim: Claim) -> tuple[bool, float]:
            if claim.idle_since_ms:
                return False, claim.idle_since_ms
            return True, -(claim.leased - shares[claim.slot].fair) / claim.weight

        return [claim.slot for claim in sorted(claims, key=rank)]


@dataclass(frozen=True)
class Scene:
    """All claims on a device, and what is left to lease; negative where outsiders took what was promised."""

    claims: tuple[Claim, ...]
    unleased: int

    @cached_property
    def of(self) -> dict[int, Share]:
        """The shares of what is leased and what is left, less what starting engines wait for; worked out
        only where somebody waits."""
        total = sum(claim.leased - claim.starting for claim in self.claims) + self.unleased
        return shares.shares(self.claims, max(0, total))

    def claim(self, slot: int) -> Claim:
        return next(claim for claim in self.claims if claim.slot == slot)

    def replaced(self, changed: Claim, unleased: int) -> Scene:
        """Return what there is once one claim has changed."""
        return Scene(tuple(changed if c.slot == changed.slot else c for c in self.claims), unleased)


def survey(rows: Mapping[int, Row], slot: int, want: int, unleased: int, now_ms: int) -> Scene:
    """Read what everybody claims, with `want` bytes more for `slot`."""
    claims = tuple(
        _read(other, row, now_ms, want if other == slot else _fresh_demand(row, now_ms))
        for other, row in rows.items()
    )
    return Scene(claims, unleased)


def _fresh_demand(row: Row, now_ms: int) -> int:
    fresh = now_ms - row["short_at_ms"] <= FRESH_MS or not speaks(row)
    return row["demand_bytes"] if fresh else 0


def speaks(row: Row) -> bool:
    """Say whether the owner of a slot writes the words of minor 1."""
    return row["spoken_claim"] == row["claim"]


def _read(slot: int, row: Row, now_ms: int, unmet: int) -> Claim:
    speaking = speaks(row)
    needed = row["needed_bytes"] if speaking else 0
    leased, limit = row["leased_bytes"], row["limit_wanted"]
    granule = max(1, row["granule_bytes"])
    wanted = max(row["wanted_bytes"], needed, leased + unmet if unmet else 0)
    waits_to_start = speaking and now_ms - row["short_at_ms"] <= FRESH_MS
    return Claim(
        slot, leased,
        # Whose scheduler has not said what requests need may need all it asks for.
        needed=needed or max(row["used_bytes"], wanted),
        wanted=wanted,
        floor=row["floor_wanted"],
        limit=limit,
        weight=max(1, row["weight_wanted"]),
        unmet=min(unmet, max(0, limit - leased)) // granule * granule,
        active=bool(unmet or row["busy"]),
        kept=speaking and now_ms < row["kept_until_ms"],
        idle_since_ms=row["idle_since_ms"] if speaking else 0,
        starting=row["starting_bytes"] if waits_to_start else 0,
        granule=granule,
        heeds=speaking,
    )  # fmt: skip


def who_gives(scene: Scene) -> dict[int, Ask]:
    """Return who is asked for how much, in the order of the policy."""
    if not any(claim.unmet or claim.starting for claim in scene.claims):
        return {}
    over = [claim for claim in scene.claims if claim.heeds and claim.leased > scene.of[claim.slot].fair]
    if not over:
        return {}
    try:
        order = [int(slot) for slot in plugin_manager().hook.kvcached_givers(claims=over, shares=scene.of)]
    except Exception:
        _log.exception("the reclaim policy failed; the built-in one is used")
        order = list(LeastRecentlyBusy().kvcached_givers(over, scene.of))
    return shares.asked(scene.claims, scene.of, scene.unleased, list(dict.fromkeys(order)))


def write_asks(file: LedgerFile, rows: Mapping[int, Row], folder: DeviceFolder, scene: Scene,
               asks: Mapping[int, Ask], now_ms: int) -> list[int]:  # fmt: skip
    """Write into every slot what it is asked; ring, and return, those who are asked for more than before.

    A value is written before the time until which it holds is prolonged, so that a reader never goes by an
    old value for longer than it was meant. `rows` were read since the lock is held.
    """
    rung = []
    for claim in scene.claims:
        slot, row, ask = claim.slot, rows[claim.slot], asks.get(claim.slot, Ask(0, 0))
        target = _line(claim.leased, ask.give, claim.granule)
        must = _line(claim.leased, ask.must, claim.granule)
        lapsed = now_ms >= row["asked_until_ms"]
        before, must_before = (0 if lapsed else row[name] for name in ("target_bytes", "must_bytes"))
        more = _is_more(target, before) or _is_more(must, must_before)
        if target == before == 0 and not row["target_bytes"]:
            continue
        if more and not before:
            file.set(slot, "asked_since_ms", now_ms)  # first: whoever meets the target reads it
        file.set(slot, "target_bytes", target)
        file.set(slot, "must_bytes", must)
        file.set(slot, "reclaim_bytes", ask.give)
        file.set(slot, "asked_until_ms", now_ms + FRESH_MS if target else 0)
        if more:
            if not before:
                file.set(slot, "reclaims", row["reclaims"] + 1)
            rung.append(slot)
            ring(folder.engine_bell(slot))
    return rung


def _is_more(line: int, before: int) -> bool:
    return line > 0 and (not before or line < before)


def _line(leased: int, give: int, granule: int) -> int:
    """Return what may be held after giving: whole granules, at least the one with block 0 (I7); 0 for all."""
    return max(granule, (leased - give) // granule * granule) if give else 0
