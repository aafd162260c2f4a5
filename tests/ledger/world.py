"""A plain model of a whole ledger, in granules: holdings, demand, reclaims and leases of all engines.

It follows the rules of docs/design.md; shares come from tests.ledger.fairness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from kvcached_core.ledger import Account, SchedulerView
from kvcached_core.ledger.policy.shares import Claim
from tests.ledger import fairness
from tests.ledger.fairness import Levels
from tests.ledger.helpers import CAPACITY, GRANULE

TOTAL = CAPACITY // GRANULE
HEADROOM = 2
FRESH_MS = KEEP_MS = 1000


@dataclass
class Party:
    """The model's state of one owner; sizes are granules."""

    account: Account
    view: SchedulerView
    limit: int
    limit_wanted: int
    floor: int
    floor_wanted: int
    weight: int
    ceiling: int
    weight_wanted: int = 0
    alive: bool = True
    leased: int = 0
    ready: int = 0
    mapped: int = 0
    created: int = 0
    now: int = 0
    peak: int = 0
    demand: int = 0
    is_short: bool = False  # got less than it asked for, and still lacks some
    short_at_ms: int = 0
    coming: int = 0
    kept_until_ms: int = 0
    used: int = 0
    cached: int = 0
    needed: int = 0
    wanted: int = 0
    busy: bool = False
    idle_since_ms: int = 0
    target: int = 0
    must: int = 0
    reclaim: int = 0
    reclaims: int = 0
    asked_until_ms: int = 0
    start: tuple[int, int] | None = None  # private and floor of an engine that is not yet admitted
    starting: int = 0
    queued_at_ms: int = 0

    @property
    def slot(self) -> int:
        return self.account.slot

    @property
    def goal(self) -> int:
        """Granules that it holds in the end, if there is room."""
        return min(self.limit_wanted, max(self.wanted, self.needed)) if self.start is None else 0

    def fall(self, granules: int) -> None:
        self.leased -= granules
        self.ceiling = max(self.limit, min(self.ceiling, self.leased))

    def apply_controls(self) -> None:
        if self.limit != self.limit_wanted:
            self.ceiling = max(self.limit_wanted, self.leased)
        self.limit, self.floor, self.weight = self.limit_wanted, self.floor_wanted, self.weight_wanted

    def retake(self) -> None:
        """Note that the slot was written again, without the reclaims by other engines."""
        self.target = self.must = self.reclaim = self.reclaims = self.asked_until_ms = 0


@dataclass
class World:
    """All owners, dead ones until they are swept; `outside` is memory of processes outside the ledger."""

    parties: list[Party] = field(default_factory=list)
    outside: int = 0
    now_ms: int = 0

    @property
    def living(self) -> list[Party]:
        return [party for party in self.parties if party.alive]

    @property
    def free(self) -> int:
        """Free memory as the driver reports it."""
        return TOTAL - self.outside - sum(party.ready + party.now for party in self.living)

    @property
    def unleased(self) -> int:
        """Granules that may still be leased: within the device and within its free memory."""
        of_device = TOTAL - HEADROOM - sum(party.leased for party in self.parties)
        unkept = sum(party.leased - party.ready for party in self.parties)
        private = sum(max(0, party.peak - party.now) for party in self.parties)
        return min(of_device, self.free - unkept - private - HEADROOM)

    def sweep(self) -> None:
        self.parties = self.living

    def floors_but(self, party: Party | None) -> int:
        return sum(max(p.floor, p.floor_wanted) for p in self.living if p is not party)

    def claims(self, asks: Party | None = None, unmet: int = 0) -> list[Claim]:
        """Return all claims, with `unmet` for the owner that asks."""
        return [
            self._claim(party, unmet if party is asks else self._fresh_demand(party))
            for party in sorted(self.parties, key=lambda party: party.slot)
        ]

    def _fresh_demand(self, party: Party) -> int:
        return party.demand if self.now_ms - party.short_at_ms <= FRESH_MS else 0

    def _claim(self, party: Party, unmet: int) -> Claim:
        wanted = max(party.wanted, party.needed, party.leased + unmet if unmet else 0)
        return Claim(
            party.slot, party.leased, needed=party.needed or max(party.used, wanted), wanted=wanted,
            floor=party.floor_wanted, limit=party.limit_wanted, weight=party.weight_wanted,
            unmet=min(unmet, max(0, party.limit_wanted - party.leased)),
            active=unmet > 0 or party.busy, kept=self.now_ms < party.kept_until_ms,
            idle_since_ms=party.idle_since_ms,
            starting=party.starting if self.now_ms - party.short_at_ms <= FRESH_MS else 0,
        )  # fmt: skip

    @staticmethod
    def entitled(claims: Sequence[Claim], unleased: int) -> dict[int, Levels]:
        total = sum(claim.leased - claim.starting for claim in claims) + unleased
        return fairness.entitled(claims, max(0, total))

    def lease(self, party: Party, want: int) -> int:
        """Return the granules that a lease of `want` (at least 1) gets, and change the model to match."""
        party.apply_controls()
        unmet, unleased = max(want, party.wanted - party.leased), self.unleased
        claims = self.claims(party, unmet)
        of = self.entitled(claims, unleased)
        mine = next(claim for claim in claims if claim.slot == party.slot)
        others = [claim for claim in claims if claim.slot != party.slot]
        room = min(unleased, party.limit - party.leased)
        granted = fairness.allowed(mine, want, room, others, of)
        if granted < min(want, party.limit - party.leased) and self.parties != self.living:
            self.sweep()
            return self.lease(party, want)
        if granted and (party.is_short or granted < want):
            party.kept_until_ms = self.now_ms + KEEP_MS
        party.leased += granted
        party.demand = unmet - granted
        if party.demand:
            party.short_at_ms = self.now_ms
        party.is_short = granted < want or (party.is_short and party.demand > 0)
        self._i10(mine, granted, want, room, others, of)
        after = mine._replace(
            leased=party.leased, unmet=max(0, min(party.demand, party.limit - party.leased))
        )
        asked = self._ask([after if claim is mine else claim for claim in claims], unleased - granted)
        party.coming = min(asked, after.unmet) if granted < want else party.demand
        return granted

    @staticmethod
    def _i10(mine: Claim, granted: int, want: int, room: int, others: list[Claim],
             of: dict[int, Levels]) -> None:  # fmt: skip
        """Check I10: no owner waits while enough is free, unless an owner with a higher claim waits too."""
        if granted == want or room <= granted:
            return
        level = sum(mine.leased + granted + 1 > int(share) for share in of[mine.slot])
        assert level > 0, "I10: nothing comes before a floor"
        waits = sum(other.starting + fairness.short(other, of[other.slot][level - 1]) for other in others)
        assert waits >= room - granted, "I10"

    def _ask(self, claims: list[Claim], unleased: int) -> int:
        """Write the reclaims after a lease, or after a start that waits; return their sum."""
        of = self.entitled(claims, unleased)
        asks: dict[int, tuple[int, int]] = {}
        if any(claim.unmet or claim.starting for claim in claims):
            asks = fairness.reclaims(claims, of, unleased, _order(claims, of))
        slots = {other.slot: other for other in self.parties}
        for claim in claims:
            self._write(slots[claim.slot], *asks.get(claim.slot, (0, 0)))
        return sum(give for give, _ in asks.values())

    def _write(self, party: Party, give: int, must: int) -> None:
        before = party.target if self.now_ms < party.asked_until_ms else 0
        party.target = max(1, party.leased - give) if give else 0
        party.must = max(1, party.leased - must) if must else 0
        party.asked_until_ms = self.now_ms + FRESH_MS if give else 0
        party.reclaim = give
        if give and not before:
            party.reclaims += 1

    def ask_to_start(self, party: Party) -> tuple[bool, int, int] | None:
        """Return (admitted, ahead, missing), or None if the engine can never fit."""
        assert party.start is not None
        private, floor = party.start
        self.sweep()
        others = [other for other in self.living if other is not party]
        # The granule with block 0 is never given (I7).
        taken = sum(max(other.floor, other.floor_wanted, 1) + max(other.peak, other.now) for other in others)
        if self.floors_but(party) + floor > TOTAL or private + floor > TOTAL - HEADROOM - taken:
            return None
        party.queued_at_ms = party.queued_at_ms or self.now_ms
        party.short_at_ms, party.starting = self.now_ms, 0
        ahead = sum(
            other.queued_at_ms > 0
            and self.now_ms - other.short_at_ms <= FRESH_MS
            and (other.queued_at_ms, other.slot) < (party.queued_at_ms, party.slot)
            for other in others
        )
        promised = max(0, party.peak - party.now)
        claim = max(0, private - party.now) + floor
        missing = claim - self.unleased - promised if claim > promised else 0
        if missing <= 0 and not ahead:
            party.peak, party.queued_at_ms, party.start = private, 0, None
            party.floor = party.floor_wanted = floor
            return True, 0, 0
        party.starting = max(0, claim - promised)
        self._ask(self.claims(party, 0), self.unleased)
        return False, ahead, max(0, missing)


def _order(claims: Sequence[Claim], of: dict[int, Levels]) -> list[int]:
    """Return the slots of givers in order: longest idle first, then farthest above their shares by weight."""

    def rank(claim: Claim) -> tuple[bool, Fraction]:
        if claim.idle_since_ms:
            return False, Fraction(claim.idle_since_ms)
        return True, -Fraction(claim.leased - int(of[claim.slot][2]), claim.weight)

    over = [claim for claim in claims if claim.leased > int(of[claim.slot][2])]
    return [claim.slot for claim in sorted(over, key=rank)]
