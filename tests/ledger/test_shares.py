"""The arithmetic of shares against a plain model, and properties that hold for all numbers."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_core.ledger.policy.shares import (
    Bound,
    Claim,
    Reclaim,
    Share,
    fill,
    grantable,
    reclaims,
    shares,
    short_of,
)
from tests.ledger import fairness

SMALL = st.integers(0, 24)
LARGE = st.integers(0, 1 << 44)  # 16 TiB
WEIGHTS = st.integers(1, 1000)
each = settings(deadline=None, max_examples=300, database=None)


@st.composite
def bounds(draw: st.DrawFn, sizes: st.SearchStrategy[int] = LARGE) -> list[Bound]:
    found = []
    for _ in range(draw(st.integers(1, 8))):
        low, high = sorted((draw(sizes), draw(sizes)))
        found.append(Bound(low, high, draw(WEIGHTS)))
    return found


@st.composite
def claims(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SMALL) -> list[Claim]:
    """Return claims as a ledger may show them: a scheduler's fields may be older than its worker's."""
    found = []
    for slot in range(draw(st.integers(1, 6))):
        leased, unmet, busy = draw(sizes), draw(st.just(0) | sizes), draw(st.booleans())
        limit = draw(sizes | st.just(1 << 44))
        needed = draw(sizes)
        wanted = max(draw(sizes), needed, leased + unmet if unmet else 0)
        found.append(
            Claim(
                slot, leased, needed=needed, wanted=wanted, floor=draw(st.just(0) | sizes), limit=limit,
                weight=draw(WEIGHTS), unmet=min(unmet, max(0, limit - leased)), active=bool(unmet or busy),
                kept=draw(st.booleans()), starting=draw(st.just(0) | st.just(0) | sizes),
            )
        )  # fmt: skip
    return found


def world(owners: list[Claim], unleased: int) -> tuple[int, dict[int, Share]]:
    total = max(0, sum(owner.leased - owner.starting for owner in owners) + unleased)
    return total, shares(owners, total)


@each
@given(bounds(), LARGE)
def test_fill_equals_the_plain_model(limits: list[Bound], total: int) -> None:
    plain = fairness.pour(total, fairness.as_fractions(limits))
    for got, exact in zip(fill(total, limits), plain, strict=True):
        assert abs(got - exact) <= len(limits)


@each
@given(bounds(), LARGE)
def test_fill_hands_out_the_total_and_not_more(limits: list[Bound], total: int) -> None:
    got = fill(total, limits)
    most = min(total, sum(bound.high for bound in limits))
    assert most - len(limits) <= sum(got) <= most + len(limits)
    cut = sum(bound.low for bound in limits) > total
    for share, bound in zip(got, limits, strict=True):
        assert 0 <= share <= bound.high
        assert share <= bound.low if cut else share >= bound.low


@each
@given(bounds(), LARGE)
def test_fill_is_max_min_fair(limits: list[Bound], total: int) -> None:
    """Raising one share needs lowering one whose level, bytes by weight, is not higher."""
    if sum(bound.low for bound in limits) > total:
        limits = [Bound(0, bound.low, bound.weight) for bound in limits]
    got = fill(total, limits)
    for share, bound in zip(got, limits, strict=True):
        if share + len(limits) >= bound.high:
            continue
        level = Fraction(share + len(limits) + 1, bound.weight)
        for other, other_bound in zip(got, limits, strict=True):
            if other > other_bound.low:
                assert Fraction(other - len(limits) - 1, other_bound.weight) <= level


@pytest.mark.parametrize("owners", [2, 3, 7, 64])
@pytest.mark.parametrize("weight", [1, 100, 333])
def test_equal_shares_of_whole_granules_are_whole(owners: int, weight: int) -> None:
    granule = 14 << 20
    limits = [Bound(0, 1 << 44, weight)] * owners
    assert fill(5 * owners * granule, limits) == [5 * granule] * owners


def test_the_worked_example_of_the_docstring_is_right() -> None:
    a = Claim(0, 90, needed=30, wanted=90, floor=20, limit=100, weight=1)
    b = Claim(1, 10, needed=60, wanted=70, floor=0, limit=100, weight=1, unmet=50)
    of = shares([a, b], 100)
    assert of == {0: Share(20, 30, 40), 1: Share(0, 60, 60)}
    assert reclaims([a, b], of, 0, [0, 1]) == {0: Reclaim(give=50, must=0)}
    c = Claim(2, 0, needed=40, wanted=40, floor=0, limit=100, weight=1)
    of = shares([a, b, c], 100)
    assert [share.need for share in of.values()] == [share.fair for share in of.values()] == [30, 35, 35]


@each
@given(claims(LARGE), LARGE)
def test_floor_need_and_fair_are_those_of_the_plain_model(owners: list[Claim], unleased: int) -> None:
    total, of = world(owners, unleased)
    plain = fairness.entitled(owners, total)
    for owner in owners:
        share = of[owner.slot]
        for got, exact in zip(share, plain[owner.slot], strict=True):
            assert abs(got - exact) <= 3 * len(owners)
        assert 0 <= share.floor <= share.need <= share.fair
        assert share.floor <= owner.floor
        assert share.need <= max(share.floor, min(owner.needed, owner.limit))
        assert share.fair <= max(share.need, min(owner.wanted, owner.limit))
    for level in range(3):
        assert sum(share[level] for share in of.values()) <= total + len(owners)


@each
@given(claims(), st.integers(-20, 60), st.integers(2, 5))
def test_shares_are_whole_granules(owners: list[Claim], unleased: int, granule: int) -> None:
    owners = [owner._replace(granule=granule) for owner in owners]
    coarse, (total, fine) = (
        world(owners, unleased)[1],
        world([o._replace(granule=1) for o in owners], unleased),
    )
    for slot, share in coarse.items():
        assert all(level % granule == 0 for level in share)
        assert all(0 <= a - b < granule for a, b in zip(fine[slot], share, strict=True))
    assert sum(share.fair for share in coarse.values()) <= total + len(owners)


@each
@given(claims(), st.integers(-20, 60), st.integers(1, 60))
def test_a_lease_gets_what_the_plain_model_allows(owners: list[Claim], unleased: int, want: int) -> None:
    _, of = world(owners, unleased)
    mine, others = owners[0], owners[1:]
    room = min(unleased, mine.limit - mine.leased)
    got = grantable(mine, want, room, others, of)
    assert got == fairness.allowed(mine, want, room, others, of)
    assert 0 <= got <= max(0, min(want, room))


@each
@given(claims(), st.integers(0, 60), st.integers(1, 60))
def test_a_lease_leaves_memory_that_others_wait_for_on_a_higher_level(
    owners: list[Claim], free: int, want: int
) -> None:
    _, of = world(owners, free)
    mine, others = owners[0], owners[1:]
    got = grantable(mine, want, free, others, of)
    starting = sum(other.starting for other in others)
    for level, share in enumerate(of[mine.slot]):
        if mine.leased + got > share and got:
            waits = sum(short_of(other, of[other.slot][level]) for other in others)
            beyond = min(got, mine.leased + got - share)
            assert beyond <= max(0, free - (got - beyond) - waits - starting)
            assert free - got >= waits + starting


@each
@given(claims(), st.integers(-20, 60), st.integers(1, 60))
def test_i10_if_nobody_else_waits_a_lease_gets_all_the_room(
    owners: list[Claim], room: int, want: int
) -> None:
    others = [owner._replace(unmet=0, starting=0) for owner in owners[1:]]
    _, of = world([owners[0], *others], room)
    assert grantable(owners[0], want, room, others, of) == max(0, min(want, room))


@each
@given(claims(), st.integers(-20, 60), st.randoms(use_true_random=False))
def test_reclaims_equal_the_plain_model(owners: list[Claim], unleased: int, chance: random.Random) -> None:
    _, of = world(owners, unleased)
    order = [owner.slot for owner in owners]
    chance.shuffle(order)
    assert reclaims(owners, of, unleased, order) == fairness.reclaims(owners, of, unleased, order)


@each
@given(claims(), st.integers(-20, 60))
def test_no_reclaim_goes_below_a_share_and_all_together_take_no_more_than_is_missing(
    owners: list[Claim], unleased: int
) -> None:
    _, of = world(owners, unleased)
    found = reclaims(owners, of, unleased, [owner.slot for owner in owners])
    for slot, reclaim in found.items():
        assert 0 <= reclaim.must <= reclaim.give <= owners[slot].leased - of[slot].fair
    short = sum(short_of(owner, of[owner.slot].fair) + owner.starting for owner in owners)
    floors = sum(short_of(owner, of[owner.slot].floor) for owner in owners)
    missing, for_floors = max(0, short - unleased), max(0, floors - unleased) if floors else 0
    assert sum(reclaim.must for reclaim in found.values()) <= for_floors
    assert sum(reclaim.give for reclaim in found.values()) <= missing + for_floors
    needs = sum(short_of(owner, of[owner.slot].need) + owner.starting for owner in owners)
    for owed, kept_too in ((missing, False), (max(0, needs - unleased) if needs else 0, True)):
        there = sum(
            max(0, owner.leased - max(1, of[owner.slot].fair, owner.needed if owner.kept else 0))
            for owner in owners
            if kept_too or not owner.kept
        )
        assert sum(reclaim.give for reclaim in found.values()) >= min(owed, there), "somebody could give more"


@each
@given(claims(), st.integers(-20, 60))
def test_spare_goes_before_cache_and_cache_before_memory_of_requests(
    owners: list[Claim], unleased: int
) -> None:
    owners = [owner._replace(kept=False) for owner in owners]
    _, of = world(owners, unleased)
    found = reclaims(owners, of, unleased, [owner.slot for owner in owners])
    gives = {owner.slot: found.get(owner.slot, Reclaim(0, 0)).give for owner in owners}
    for kind in ("wanted", "needed"):
        above = {o.slot: max(0, o.leased - max(1, of[o.slot].fair, getattr(o, kind))) for o in owners}
        if any(gives[slot] > above[slot] for slot in gives):
            assert all(gives[slot] >= above[slot] for slot in gives), "somebody has some of it left"


@each
@given(claims(), st.integers(-20, 60))
def test_memory_just_granted_that_requests_need_is_reclaimed_for_floors_only(
    owners: list[Claim], unleased: int
) -> None:
    _, of = world(owners, unleased)
    found = reclaims(owners, of, unleased, [owner.slot for owner in owners])
    others_need = any(owner.starting or short_of(owner, of[owner.slot].need) for owner in owners)
    for owner in owners:
        reclaim = found.get(owner.slot, Reclaim(0, 0))
        if owner.kept and reclaim.give > reclaim.must:
            assert others_need, "for the cache of others nothing is taken of it"
            assert owner.leased - reclaim.give >= owner.needed


@each
@given(claims(), st.integers(0, 60))
def test_no_starvation_once_reclaims_are_met_every_share_is_there(owners: list[Claim], unleased: int) -> None:
    owners = [owner._replace(kept=False, starting=0) for owner in owners]
    _, of = world(owners, unleased)
    found = reclaims(owners, of, unleased, [owner.slot for owner in owners])
    free = unleased + sum(reclaim.give for reclaim in found.values())
    stuck = sum(owner.leased == 1 and not of[owner.slot].fair for owner in owners)  # I7
    short = sum(short_of(owner, of[owner.slot].fair) for owner in owners)
    assert free >= short - len(owners) - stuck
