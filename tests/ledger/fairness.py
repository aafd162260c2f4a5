"""A slow and plain model of fairness, to compare kvcached_core.ledger.policy.shares with.

Shares are exact fractions; leases and reclaims are counted unit by unit, in the unit of the claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from kvcached_core.ledger.policy.shares import Bound, Claim

Levels = tuple[Fraction, Fraction, Fraction]  # floor, need, fair


def pour(total: int | Fraction, bounds: Sequence[tuple[Fraction, Fraction, int]]) -> list[Fraction]:
    """Return max-min fair shares of `total` between (low, high) by weight."""
    if sum(high for _, high, _ in bounds) <= total:
        return [high for _, high, _ in bounds]
    if sum(low for low, _, _ in bounds) > total:
        return pour(max(Fraction(0), Fraction(total)), [(Fraction(0), low, w) for low, _, w in bounds])

    def poured(level: Fraction) -> list[Fraction]:
        return [max(low, min(high, level * weight)) for low, high, weight in bounds]

    marks = sorted({edge / weight for low, high, weight in bounds for edge in (low, high)} | {Fraction(0)})
    amounts = [sum(poured(mark), Fraction(0)) for mark in marks]
    above = next(at for at, amount in enumerate(amounts) if amount >= total)
    if amounts[above] == total:
        return poured(marks[above])
    # Between two marks the amount is linear in the level.
    part = (total - amounts[above - 1]) / (amounts[above] - amounts[above - 1])
    return poured(marks[above - 1] + part * (marks[above] - marks[above - 1]))


def as_fractions(bounds: Sequence[Bound]) -> list[tuple[Fraction, Fraction, int]]:
    return [(Fraction(low), Fraction(high), weight) for low, high, weight in bounds]


def entitled(claims: Sequence[Claim], total: int) -> dict[int, Levels]:
    """Return the shares of each claim on the three levels, not rounded."""
    needs = [Fraction(min(claim.needed, claim.limit)) for claim in claims]
    wants = [Fraction(min(claim.wanted, claim.limit)) for claim in claims]
    weights = [claim.weight for claim in claims]
    zeros = [Fraction(0)] * len(claims)
    floors = [min(need, Fraction(claim.floor)) for need, claim in zip(needs, claims, strict=True)]
    floor = pour(total, list(zip(zeros, floors, weights, strict=True)))
    need = pour(total, [(f, max(f, n), w) for f, n, w in zip(floor, needs, weights, strict=True)])
    fair = pour(
        total,
        [(x, max(x, want) if claim.active else x, claim.weight)
         for x, want, claim in zip(need, wants, claims, strict=True)],
    )  # fmt: skip
    return {c.slot: levels for c, *levels in zip(claims, floor, need, fair, strict=True)}  # type: ignore[misc]


def short(claim: Claim, level: int | Fraction) -> int:
    """Return how many units of its share a waiting owner lacks; a fraction of a unit is not counted."""
    return max(0, min(claim.unmet, int(level) - claim.leased))


def allowed(mine: Claim, want: int, room: int, others: Sequence[Claim],
            of: Mapping[int, Sequence[int | Fraction]]) -> int:  # fmt: skip
    """Return how much a lease may get, unit by unit, without the memory that others wait for first."""
    granted = 0
    while granted < want and granted < room:
        holds = mine.leased + granted + 1
        level = sum(holds > int(share) for share in of[mine.slot])  # 0 floor, 1 need, 2 fair, 3 a loan
        before = 0
        if level:
            before = sum(other.starting + short(other, of[other.slot][level - 1]) for other in others)
        if room - granted - 1 < before:
            break
        granted += 1
    return granted


def reclaims(claims: Sequence[Claim], of: Mapping[int, Sequence[int | Fraction]], unleased: int,
          order: Sequence[int]) -> dict[int, tuple[int, int]]:  # fmt: skip
    """Return (give, must) by slot, in units: givers give spare memory first, then cache, then the rest."""
    by_slot = {claim.slot: claim for claim in claims}
    givers = [by_slot[slot] for slot in order]
    floors, need, fair = (sum(short(claim, of[claim.slot][level]) for claim in claims) for level in range(3))
    starting = sum(claim.starting for claim in claims)
    give = dict.fromkeys(order, 0)
    if need or starting:
        _take(give, givers, of, need + starting - unleased, kept_give=("spare", "cache"))
    _take(give, givers, of, fair + starting - unleased - sum(give.values()), kept_give=())
    must = dict.fromkeys(order, 0)
    _take(must, givers, of, floors - unleased if floors else 0, kept_give=("spare", "cache", "used"))
    slots = {slot for slot in by_slot if give.get(slot) or must.get(slot)}
    return {slot: (max(give.get(slot, 0), must.get(slot, 0)), must.get(slot, 0)) for slot in slots}


def _take(given: dict[int, int], givers: Sequence[Claim], of: Mapping[int, Sequence[int | Fraction]],
          missing: int, kept_give: Sequence[str]) -> None:  # fmt: skip
    """Raise `given` unit by unit until nothing is missing; a giver with `kept` gives `kept_give` only."""
    for kind in ("spare", "cache", "used"):
        for giver in givers:
            if giver.kept and kind not in kept_give:
                continue
            keeps = {"spare": giver.wanted, "cache": giver.needed, "used": 0}[kind]
            while missing > 0 and giver.leased - given[giver.slot] > max(1, keeps, int(of[giver.slot][2])):
                given[giver.slot] += 1
                missing -= 1
