"""Who is entitled to how much of a device, and who gives back: arithmetic on bytes, no file, no clock.

Three levels, one after the other, of what can be leased in all:

    floor   min(needed, floor)
    need    max-min fair by weight over what requests need, at least the floor
    fair    max-min fair by weight over what engines with requests want besides, which is cache and spare

Max-min fair: share(i) = clamp(level * weight(i), low(i), high(i)), with the one level at which the shares add
up to the total (Bertsekas and Gallager, Data Networks, 6.5.2). A share is whole granules: nobody waits for a
fraction that cannot be used. What nobody is entitled to is lent to whoever asks: the cache of an idle
engine is such a loan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_FRACTION_BITS = 32
_LINES = ("wanted", "needed", "entitled")  # what an owner gives: spare, then cache, then what requests let go


class Claim(NamedTuple):
    """What one owner has and asks for, in bytes of this device."""

    slot: int
    leased: int
    needed: int  # what requests hold or are about to take
    wanted: int  # that, and cache and spare
    floor: int
    limit: int
    weight: int
    unmet: int = 0  # asked for in the last second and not got
    active: bool = True  # has requests, or asks
    kept: bool = False  # waited for memory and got it a moment ago: what requests need of it stays
    idle_since_ms: int = 0
    starting: int = 0  # claimed by an engine that waits for its start
    granule: int = 1  # leased, unmet and shares are multiples of it
    heeds: bool = True  # of a version that reads what it is asked


class Share(NamedTuple):
    """What an owner is entitled to; floor <= need <= fair."""

    floor: int
    need: int
    fair: int


class Ask(NamedTuple):
    """What an owner is asked to give: `give` bytes in all, `must` of them by preemption if need be."""

    give: int
    must: int


class Bound(NamedTuple):
    """One share between `low` and `high`."""

    low: int
    high: int
    weight: int


def fill(total: int, bounds: Sequence[Bound]) -> list[int]:
    """Return the max-min fair shares; without room for all of `low`, these are cut in the same way."""
    if sum(bound.high for bound in bounds) <= total:
        return [bound.high for bound in bounds]
    if sum(bound.low for bound in bounds) > total:
        return fill(max(0, total), [Bound(0, bound.low, bound.weight) for bound in bounds])
    level, of = _level(total, bounds)
    return [max(b.low, min(b.high, level * b.weight // of)) for b in bounds]


def _level(total: int, bounds: Sequence[Bound]) -> tuple[int, int]:
    """Return the level, a fraction, at which the shares add up to `total`, between both sums.

    The fraction is exact, so that n equal shares of n granules are a granule each, not a byte less.
    """
    events = sorted(
        [((b.low << _FRACTION_BITS) // b.weight, 0, b.low, b.weight) for b in bounds]
        + [((b.high << _FRACTION_BITS) // b.weight, 1, b.high, b.weight) for b in bounds]
    )
    fixed, weights, level = sum(bound.low for bound in bounds), 0, 0
    for level, is_high, size, weight in events:
        # Between two events the shares add up to fixed + level * weights.
        if weights and fixed + (level * weights >> _FRACTION_BITS) >= total:
            return total - fixed, weights
        if is_high:
            fixed, weights = fixed + size, weights - weight
        else:
            fixed, weights = fixed - size, weights + weight
    return level, 1 << _FRACTION_BITS


def shares(claims: Sequence[Claim], total: int) -> dict[int, Share]:
    """Return what each owner is entitled to of `total` bytes, by slot."""
    needs = [min(claim.needed, claim.limit) for claim in claims]
    floors = fill(total, [Bound(0, min(n, c.floor), c.weight) for c, n in zip(claims, needs, strict=True)])
    need = fill(total, [Bound(f, max(f, n), c.weight)
                        for c, f, n in zip(claims, floors, needs, strict=True)])  # fmt: skip
    fair = fill(total, [Bound(x, max(x, min(c.wanted, c.limit)) if c.active else x, c.weight)
                        for c, x in zip(claims, need, strict=True)])  # fmt: skip
    levels = zip(claims, zip(floors, need, fair, strict=True), strict=True)
    return {c.slot: Share(*(level // c.granule * c.granule for level in each)) for c, each in levels}


def short_of(claim: Claim, entitled: int) -> int:
    """Return what an owner asks for and is entitled to, and has not got."""
    return min(claim.unmet, max(0, entitled - claim.leased))


def grantable(mine: Claim, want: int, room: int, others: Iterable[Claim], of: Mapping[int, Share]) -> int:
    """Return how much of `want` may be granted now: what others wait for on a higher level comes first."""
    share, left = of[mine.slot], list(others)
    starting = sum(other.starting for other in left)
    reserved = [
        starting + sum(short_of(other, of[other.slot][level]) for other in left)
        for level in range(len(Share._fields))
    ]
    granted = 0
    for upto, kept_free in zip((*share, mine.leased + want), (0, *reserved), strict=True):
        part = min(upto - mine.leased - granted, want - granted, room - granted - kept_free)
        granted += max(0, part)
    return granted


def asked(claims: Sequence[Claim], of: Mapping[int, Share], unleased: int,
          order: Sequence[int]) -> dict[int, Ask]:  # fmt: skip
    """Return what each owner is asked to give, by slot, for those who wait; `order` is who gives first.

    Nobody is asked below what it is entitled to, and all together not for more than is missing. Spare
    memory goes first, of all owners, then their caches, then what requests that end let go.
    """
    missing = [
        sum(short_of(claim, of[claim.slot][level]) for claim in claims) for level in range(len(Share._fields))
    ]
    floors, need, fair = missing
    starting = sum(claim.starting for claim in claims)
    by_slot = {claim.slot: claim for claim in claims}
    givers = [by_slot[slot] for slot in order if slot in by_slot]
    # Against thrashing: of what an owner got a moment ago the cache of others takes nothing, their requests
    # take its cache and spare, and only a floor takes what its requests need.
    for_need = need + starting - unleased if need or starting else 0
    gives = _collect(givers, of, for_need, {}, kept_lines=_LINES[:2])
    gives = _collect(givers, of, fair + starting - unleased - sum(gives.values()), gives, kept_lines=())
    musts = _collect(givers, of, floors - unleased if floors else 0, {}, kept_lines=_LINES)
    slots = gives.keys() | musts.keys()
    return {s: Ask(max(gives.get(s, 0), musts.get(s, 0)), musts.get(s, 0)) for s in slots}


def _collect(givers: Sequence[Claim], of: Mapping[int, Share], missing: int, taken: Mapping[int, int],
             kept_lines: Sequence[str]) -> dict[int, int]:  # fmt: skip
    """Take from each what it holds above one line after the other, until nothing is missing.

    `taken` is asked of them already; who is kept gives down to `kept_lines` only.
    """
    gives = dict(taken)
    for line in _LINES:
        for giver in givers:
            if giver.kept and line not in kept_lines:
                continue
            entitled = max(of[giver.slot].fair, giver.granule)  # the granule with block 0 always stays (I7)
            keep = entitled if line == "entitled" else max(entitled, getattr(giver, line))
            there = giver.leased - gives.get(giver.slot, 0) - keep
            part = min(there, missing)
            if part > 0:
                gives[giver.slot] = gives.get(giver.slot, 0) + part
                missing -= part
    return gives
