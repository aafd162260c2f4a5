"""Fair shares of a device, and who gives memory back: arithmetic on bytes, without files or clocks.

Each engine is entitled to a share of the memory that can be leased. The share is computed on three levels,
and each level starts from the one before it:

    floor   min(needed, floor)
    need    memory that requests need, at least the floor level
    fair    also prefix cache and spare memory, for engines with requests; at least the need level

On each level memory is divided max-min fairly by weight: share(i) = clamp(level * weight(i), low(i),
high(i)), with the one level at which the shares add up to the total (Bertsekas and Gallager, Data Networks,
6.5.2). A share is rounded down to whole granules, because nobody can use a part of one. Memory above all
shares is lent to any engine that asks: the cache of an idle engine is such a loan.

An example with 100 GiB and equal weights:

    engine   floor   needed   wanted      level: floor   need   fair
    A           20       30       90                20     30     40
    B            0       60       70                 0     60     60

The needs, 30 + 60, fit. The remaining 10 GiB go to the engine with the smaller share, A. If B holds 10 and A
all the rest, B may lease 50 more, and A is asked to give 50: first its spare memory, then cached blocks, down
to its share of 40. If a third engine C needs 40, the needs no longer fit. All three get at most 35, and A,
which needs less, gets 30: the shares are 30, 35 and 35, and no engine has a share for its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_FRACTION_BITS = 32
# An engine gives memory above one threshold after the other: spare memory, cache, then memory that requests
# still hold and release as they end.
_THRESHOLDS = ("wanted", "needed", "entitled")


class Claim(NamedTuple):
    """Memory that one owner has and asks for, in bytes of this device."""

    slot: int
    leased: int
    needed: int  # held by requests, or about to be
    wanted: int  # needed, and cache and spare memory
    floor: int
    limit: int
    weight: int
    unmet: int = 0  # asked for in the last second and not granted
    active: bool = True  # has requests, or asks for memory
    kept: bool = False  # was just granted memory that it waited for: its requests keep what they need
    idle_since_ms: int = 0
    starting: int = 0  # claimed by an engine that waits to start
    granule: int = 1  # leased, unmet and shares are multiples of it
    reclaimable: bool = True  # runs a version that can be asked to give memory back


class Share(NamedTuple):
    """Bytes that an owner is entitled to; floor <= need <= fair."""

    floor: int
    need: int
    fair: int


class Reclaim(NamedTuple):
    """Bytes that an owner is asked to give back: `give` in all, `must` of them by preemption if necessary."""

    give: int
    must: int


class Bound(NamedTuple):
    """One share between `low` and `high`."""

    low: int
    high: int
    weight: int


def fill(total: int, bounds: Sequence[Bound]) -> list[int]:
    """Return the max-min fair shares of `total`.

    If `low` does not fit for all, each `low` is the upper bound instead, and the lower bound is 0.
    """
    if sum(bound.high for bound in bounds) <= total:
        return [bound.high for bound in bounds]
    if sum(bound.low for bound in bounds) > total:
        return fill(max(0, total), [Bound(0, bound.low, bound.weight) for bound in bounds])
    level, denominator = _level(total, bounds)
    return [max(b.low, min(b.high, level * b.weight // denominator)) for b in bounds]


def _level(total: int, bounds: Sequence[Bound]) -> tuple[int, int]:
    """Return the level at which the shares add up to `total`, as numerator and denominator.

    `total` is between the sum of `low` and the sum of `high`. The fraction is exact, so n equal shares of n
    granules are one granule each, and not a byte less.
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
    """Return each owner's share of `total` bytes, by slot."""
    needs = [min(claim.needed, claim.limit) for claim in claims]
    floors = fill(total, [Bound(0, min(n, c.floor), c.weight) for c, n in zip(claims, needs, strict=True)])
    need = fill(total, [Bound(f, max(f, n), c.weight)
                        for c, f, n in zip(claims, floors, needs, strict=True)])  # fmt: skip
    fair = fill(total, [Bound(x, max(x, min(c.wanted, c.limit)) if c.active else x, c.weight)
                        for c, x in zip(claims, need, strict=True)])  # fmt: skip
    levels = zip(claims, zip(floors, need, fair, strict=True), strict=True)
    return {c.slot: Share(*(level // c.granule * c.granule for level in each)) for c, each in levels}


def short_of(claim: Claim, entitled: int) -> int:
    """Return the bytes that an owner asks for, is entitled to, and does not have."""
    return min(claim.unmet, max(0, entitled - claim.leased))


def grantable(mine: Claim, want: int, room: int, others: Iterable[Claim],
              share_of: Mapping[int, Share]) -> int:  # fmt: skip
    """Return how much of `want` may be granted now.

    Beyond each level of its own share, an owner leaves free the memory that others wait for up to that level.
    """
    share, left = share_of[mine.slot], list(others)
    starting = sum(other.starting for other in left)
    reserved = [
        starting + sum(short_of(other, share_of[other.slot][level]) for other in left)
        for level in range(len(Share._fields))
    ]
    granted = 0
    for upto, kept_free in zip((*share, mine.leased + want), (0, *reserved), strict=True):
        part = min(upto - mine.leased - granted, want - granted, room - granted - kept_free)
        granted += max(0, part)
    return granted


def reclaims(claims: Sequence[Claim], share_of: Mapping[int, Share], unleased: int,
             order: Sequence[int]) -> dict[int, Reclaim]:  # fmt: skip
    """Return the bytes that each owner is asked to give back, by slot; `order` lists the slots that give
    first.

    No owner is asked to go below its share, and all together are asked for no more than is missing. All
    owners give spare memory first, then cache, then memory that requests release as they end.
    """
    missing = [
        sum(short_of(claim, share_of[claim.slot][level]) for claim in claims)
        for level in range(len(Share._fields))
    ]
    floors, need, fair = missing
    starting = sum(claim.starting for claim in claims)
    by_slot = {claim.slot: claim for claim in claims}
    givers = [by_slot[slot] for slot in order if slot in by_slot]
    # Against thrashing: from an owner that was just granted memory, others' caches reclaim nothing, others'
    # requests reclaim cache and spare memory, and only a floor reclaims memory that its requests need.
    for_need = need + starting - unleased if need or starting else 0
    gives = _collect(givers, share_of, for_need, {}, kept_thresholds=_THRESHOLDS[:2])
    for_fair = fair + starting - unleased - sum(gives.values())
    gives = _collect(givers, share_of, for_fair, gives, kept_thresholds=())
    for_floors = floors - unleased if floors else 0
    musts = _collect(givers, share_of, for_floors, {}, kept_thresholds=_THRESHOLDS)
    slots = gives.keys() | musts.keys()
    return {s: Reclaim(max(gives.get(s, 0), musts.get(s, 0)), musts.get(s, 0)) for s in slots}


def _collect(givers: Sequence[Claim], share_of: Mapping[int, Share], missing: int, taken: Mapping[int, int],
             kept_thresholds: Sequence[str]) -> dict[int, int]:  # fmt: skip
    """Take from each giver the memory above one threshold after the other, until nothing is missing.

    `taken` was taken from them before; givers with `kept` give down to `kept_thresholds` only.
    """
    gives = dict(taken)
    for threshold in _THRESHOLDS:
        for giver in givers:
            if giver.kept and threshold not in kept_thresholds:
                continue
            # The granule with block 0 always stays (I7).
            entitled = max(share_of[giver.slot].fair, giver.granule)
            keep = entitled if threshold == "entitled" else max(entitled, getattr(giver, threshold))
            there = giver.leased - gives.get(giver.slot, 0) - keep
            part = min(there, missing)
            if part > 0:
                gives[giver.slot] = gives.get(giver.slot, 0) + part
                missing -= part
    return gives
