"""Engines that start beside others: each waits for its turn and for memory that no other engine gets."""

from __future__ import annotations

import pytest

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import CapacityError
from kvcached_core.ledger import Account, Runtime, SchedulerView, check
from kvcached_core.ledger.start_queue import Turn
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, attach, die, engine_usage, hold, leave, picture
from tests.ledger.test_arbiter import Clock

TOTAL = CAPACITY // GRANULE


@pytest.fixture
def clock() -> Clock:
    return Clock()


def cached(runtime: Runtime, clock: Clock, granules: int) -> tuple[Account, SchedulerView]:
    """Return an idle engine with one granule in use and the rest cached."""
    account = attach(runtime, "cached", name="cached", clock=clock)
    hold(account, granules)
    view = SchedulerView.find(runtime, "cached", 1, clock=clock)
    view.publish(engine_usage(4, 4 * granules - 4, 0, 1, granules))
    view.count(0, 0, False, 1)
    return account, view


def ask(account: Account, private: int, floor: int = 0, free: int = TOTAL) -> Turn:
    return account.ask_to_start(private * GRANULE, floor * GRANULE, MemoryInfo(free * GRANULE, CAPACITY))


def test_an_engine_alone_starts_at_once_and_its_claim_is_kept_free(runtime: Runtime, clock: Clock) -> None:
    account = attach(runtime, "a", clock=clock)
    assert ask(account, 20, 5) == Turn(True, free_bytes=CAPACITY)
    assert account.floor_bytes == 5 * GRANULE
    assert attach(runtime, "b", clock=clock).lease(CAPACITY, PLENTY) == 44 * GRANULE


def test_a_start_within_its_promise_is_admitted_even_if_an_outsider_took_memory(
    runtime: Runtime, clock: Clock
) -> None:
    giver, _ = cached(runtime, clock, TOTAL - 4)
    starter = attach(runtime, "starter", name="starter", clock=clock)
    giver.set_private_peak(8 * GRANULE)
    assert not ask(starter, 1, free=0).admitted
    assert ask(starter, 0, free=0) == Turn(True, free_bytes=-8 * GRANULE)


def test_other_engines_caches_make_room_for_a_start(runtime: Runtime, clock: Clock) -> None:
    giver, view = cached(runtime, clock, TOTAL)
    starter = attach(runtime, "starter", name="starter", clock=clock)
    assert ask(starter, 30, 2, free=0) == Turn(False, 0, 32 * GRANULE, 0)
    assert (view.target_granules(), view.must_granules()) == (32, 0)
    giver.give_back(granules_released=32)
    assert ask(starter, 30, 2, free=32).admitted
    assert view.target_granules() == 32, "no more than before, until that lapses"
    clock.now += 1.1
    assert view.target_granules() == 0
    assert check(picture(runtime)) == []


def test_memory_that_a_start_waits_for_is_not_granted_to_others(runtime: Runtime, clock: Clock) -> None:
    giver, _ = cached(runtime, clock, TOTAL)
    starter, other = (attach(runtime, name, name=name, clock=clock) for name in ("starter", "other"))
    ask(starter, 30, free=0)
    giver.give_back(granules_released=32)
    assert other.lease(CAPACITY, MemoryInfo(32 * GRANULE, CAPACITY)) == 2 * GRANULE
    assert ask(starter, 30, free=32).admitted


def test_engines_start_one_after_the_other_in_the_order_they_came(runtime: Runtime, clock: Clock) -> None:
    giver, _ = cached(runtime, clock, 50)
    starters = []
    for name in ("first", "second", "third"):
        clock.now += 0.01
        starters.append(attach(runtime, name, name=name, clock=clock))
        ask(starters[-1], 20, free=14)
    assert [ask(starter, 20, free=14).ahead for starter in starters] == [0, 1, 2]
    giver.give_back(granules_released=49)
    order: list[int] = []
    while len(order) < 3:
        for at in (2, 1, 0):
            if at not in order and ask(starters[at], 20, free=63).admitted:
                order.append(at)
    assert order == [0, 1, 2]


@pytest.mark.parametrize("how", ["stopped", "dead", "left"])
def test_a_start_that_asks_no_more_is_not_waited_for(runtime: Runtime, clock: Clock, how: str) -> None:
    cached(runtime, clock, 40)
    first, second = (attach(runtime, name, name=name, clock=clock) for name in ("first", "second"))
    assert not ask(first, 30, free=24).admitted
    assert ask(second, 20, free=24).ahead == 1
    if how == "stopped":
        clock.now += 1.1
    elif how == "dead":
        die(first)
    else:
        leave(first)
    assert ask(second, 20, free=24).admitted


def test_i3_a_start_that_can_never_fit_is_refused_with_the_numbers(runtime: Runtime, clock: Clock) -> None:
    holder = attach(runtime, "holder", name="holder", clock=clock)
    assert ask(holder, 20, 10).admitted
    account = attach(runtime, "a", clock=clock)
    with pytest.raises(CapacityError, match=r"takes 30 MiB.*floor of 5 MiB.*10 MiB floors.*34 MiB are left"):
        ask(account, 30, 5)
    with pytest.raises(CapacityError, match="a floor of 60 MiB does not fit"):
        ask(account, 0, 60)
    assert account.floor_bytes == 0 and ask(account, 29, 5).admitted


def test_memory_taken_since_does_not_count_twice(runtime: Runtime, clock: Clock) -> None:
    account = attach(runtime, "a", clock=clock)
    assert ask(account, 20).admitted
    account.publish(0, 12 * GRANULE)
    assert ask(account, 60, free=TOTAL - 12).admitted, "of 60 it has 12, and 48 of the 52 that are free"


def test_engines_that_start_together_get_the_same_as_alone(runtime: Runtime, clock: Clock) -> None:
    """Three engines with 12 granules of weights each, on 64: all start, and each may lease all the rest."""
    starters = [attach(runtime, name, name=name, clock=clock) for name in "abc"]
    free = TOTAL
    for account in starters:
        assert ask(account, 12, 4, free).admitted
    for account in starters:
        free -= 12
        account.publish(0, 12 * GRANULE)
    assert [account.limit_bytes for account in starters] == [CAPACITY] * 3
    assert starters[0].lease(CAPACITY, MemoryInfo(free * GRANULE, CAPACITY)) == free * GRANULE
