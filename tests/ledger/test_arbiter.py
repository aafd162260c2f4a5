"""Reclaims when memory is short, as the engines see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pluggy
import pytest

from kvcached_core.hooks import hookimpl, plugin_manager
from kvcached_core.ledger import Account, Runtime, SchedulerView
from kvcached_core.ledger.history import read
from kvcached_core.ledger.policy.shares import Claim
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, attach, die, engine_usage, hold, picture, readable

TOTAL = CAPACITY // GRANULE


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """A worker and its scheduler, in granules."""

    def __init__(self, runtime: Runtime, name: str, clock: Clock, floor: int = 0, weight: int = 100) -> None:
        self.account: Account = attach(
            runtime, name, name=name, floor_bytes=floor * GRANULE, weight=weight, clock=clock
        )
        self.view = SchedulerView.find(runtime, name, 1, clock=clock)
        self.clock = clock

    def holds(
        self, used: int, cached: int = 0, spare: int = 0, missing: int = 0, busy: bool = True
    ) -> Engine:
        """Hold these granules and publish the usage; requests are about to take `missing` more."""
        held = used + cached + spare
        if held * GRANULE > self.account.leased_bytes:
            hold(self.account, held - self.account.leased_bytes // GRANULE)
        self.view.publish(
            engine_usage(4 * used, 4 * cached, 0, max(1, used + missing), max(1, held + missing))
        )
        self.view.count(0, 0, busy, 0 if busy else int(self.clock.now * 1000))
        return self

    def ask(self, granules: int) -> int:
        got = self.account.lease(granules * GRANULE, PLENTY) // GRANULE
        self.account.created(got)
        return got

    def give(self, granules: int) -> None:
        self.account.give_back(granules_released=granules)

    @property
    def asked(self) -> tuple[int, int]:
        return self.view.target_granules(), self.view.must_granules()

    @property
    def rung(self) -> bool:
        ready = readable(*self.view.filenos()) > 0
        self.view.drain()
        return ready


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_cache_of_an_idle_engine_goes_to_an_engine_that_needs_memory(
    runtime: Runtime, clock: Clock
) -> None:
    idle = Engine(runtime, "idle", clock).holds(1, cached=59, spare=4, busy=False)
    taker = Engine(runtime, "taker", clock).holds(0, missing=20)
    idle.view.drain()
    assert taker.ask(20) == 0
    assert idle.asked == (44, 0) and idle.rung
    assert not taker.view.refused(), "it is on its way"
    idle.give(20)
    assert taker.ask(20) == 20
    assert idle.asked == (0, 0), "what nobody waits for is not asked"


def test_busy_engines_share_by_weight_without_preemption(runtime: Runtime, clock: Clock) -> None:
    heavy = Engine(runtime, "heavy", clock, weight=300).holds(64)
    light = Engine(runtime, "light", clock, weight=100).holds(0, missing=64)
    assert light.ask(64) == 0
    assert heavy.asked == (48, 0)
    heavy.give(16)
    assert light.ask(64) == 16
    assert heavy.asked == (0, 0), "each has its share"
    assert light.view.refused()


def test_a_floor_is_restored_by_preemption_if_necessary(runtime: Runtime, clock: Clock) -> None:
    other = Engine(runtime, "other", clock).holds(60, cached=4)
    floored = Engine(runtime, "floored", clock, floor=10).holds(0, missing=40)
    assert floored.ask(40) == 0
    assert other.asked == (32, 54)
    other.give(10)
    assert floored.ask(40) == 10
    assert other.asked == (32, 0), "beyond the floor it is attrition"


def test_an_engine_is_rung_for_a_larger_reclaim_and_not_again_for_the_same(
    runtime: Runtime, clock: Clock
) -> None:
    giver = Engine(runtime, "giver", clock).holds(1, cached=63, busy=False)
    taker = Engine(runtime, "taker", clock).holds(0, missing=5)
    rings = []
    for granules in (5, 5, 9):
        giver.view.drain()
        taker.ask(granules)
        rings.append(giver.rung)
    assert rings == [True, False, True]
    assert picture(runtime).owners[0].reclaims == 1


def test_a_reclaim_for_a_floor_rings_even_if_the_target_is_the_same(runtime: Runtime, clock: Clock) -> None:
    giver = Engine(runtime, "giver", clock).holds(64)
    taker = Engine(runtime, "taker", clock).holds(0, missing=32)
    taker.ask(32)
    assert giver.asked == (32, 0)
    giver.view.drain()
    taker.account.set_floor_bytes(8 * GRANULE)
    taker.ask(32)
    assert giver.asked == (32, 56) and giver.rung


def test_a_reclaim_lapses_unless_it_is_repeated(runtime: Runtime, clock: Clock) -> None:
    giver = Engine(runtime, "giver", clock).holds(1, cached=63, busy=False)
    taker = Engine(runtime, "taker", clock).holds(0, missing=5)
    taker.ask(5)
    clock.now += 0.9
    assert giver.asked == (59, 0)
    taker.ask(5)
    clock.now += 0.9
    assert giver.asked == (59, 0)
    clock.now += 0.2
    assert giver.asked == (0, 0)


def test_demand_older_than_a_second_is_not_waited_for(runtime: Runtime, clock: Clock) -> None:
    giver = Engine(runtime, "giver", clock).holds(1, cached=63, busy=False)
    silent = Engine(runtime, "silent", clock).holds(0, missing=5)
    giver.give(1)
    lender = Engine(runtime, "lender", clock).holds(1)
    assert silent.ask(5) == 0
    giver.give(5)
    assert lender.ask(5) == 0, "five are another's"
    clock.now += 1.1
    assert lender.ask(5) == 5


def test_memory_just_granted_is_taken_back_only_for_a_floor(runtime: Runtime, clock: Clock) -> None:
    giver = Engine(runtime, "giver", clock).holds(1, cached=63, busy=False)
    first = Engine(runtime, "first", clock).holds(0, missing=60)
    assert first.ask(60) == 0
    giver.give(60)
    assert first.ask(60) == 60
    first.holds(60)
    second = Engine(runtime, "second", clock, floor=4).holds(0, missing=40)
    assert second.ask(40) == 0
    assert (first.asked, giver.asked) == ((59, 59), (1, 1)), "for the floor only"
    clock.now += 1.1
    assert second.ask(40) == 0
    assert (first.asked, giver.asked) == ((32, 59), (1, 1)), "of 63 that two need, 31 for each"


def test_i10_a_granule_that_is_nobodys_share_is_lent(runtime: Runtime, clock: Clock) -> None:
    """Two engines need all of 63 granules, 31.5 each: neither waits for half a granule."""
    third = Engine(runtime, "third", clock).holds(1, busy=False)
    a, b = (Engine(runtime, name, clock).holds(31, missing=20) for name in "ab")
    assert (a.ask(20), b.ask(20)) == (1, 0)
    assert (a.asked, b.asked, third.asked) == ((0, 0), (0, 0), (0, 0))


def test_outsiders_that_took_promised_memory_do_not_slow_a_floor_down(runtime: Runtime, clock: Clock) -> None:
    giver = Engine(runtime, "giver", clock).holds(50)
    floored = Engine(runtime, "floored", clock, floor=2).holds(0, missing=2)
    overdrawn = PLENTY._replace(free_bytes=0)
    outside = attach(runtime, "outside", name="outside", clock=clock)
    outside.set_private_peak(6 * GRANULE)
    assert floored.account.lease(2 * GRANULE, overdrawn) == 0
    assert giver.asked == (42, 42), "six that are overdrawn, and two"


class FirstSlotFirst:
    """A policy from a plugin."""

    @hookimpl
    def kvcached_givers(self, claims: Sequence[Claim]) -> Sequence[int]:
        return sorted(claim.slot for claim in claims)


class Broken:
    @hookimpl
    def kvcached_givers(self, claims: Sequence[Claim]) -> Sequence[int]:
        raise RuntimeError("broken")


@pytest.fixture
def plugins() -> Iterator[pluggy.PluginManager]:
    manager = plugin_manager()
    before = set(manager.get_plugins())
    yield manager
    for plugin in set(manager.get_plugins()) - before:
        manager.unregister(plugin)


@pytest.mark.parametrize(("policy", "gives"), [(None, [0, 5]), (FirstSlotFirst, [5, 0]), (Broken, [0, 5])])
def test_the_policy_orders_the_givers_and_by_default_the_longest_idle_gives_first(
    runtime: Runtime, clock: Clock, plugins: pluggy.PluginManager, policy: type | None, gives: list[int]
) -> None:
    if policy is not None:
        plugins.register(policy())
    one, two = Engine(runtime, "one", clock), Engine(runtime, "two", clock)
    two.holds(1, cached=31, busy=False)
    clock.now += 5
    one.holds(1, cached=31, busy=False)
    Engine(runtime, "taker", clock).holds(0, missing=5).ask(5)
    assert [32 - (engine.asked[0] or 32) for engine in (one, two)] == gives


def test_memory_is_not_kept_for_a_dead_waiter(runtime: Runtime, clock: Clock) -> None:
    giver = Engine(runtime, "giver", clock).holds(1, cached=62, busy=False)
    lender = Engine(runtime, "lender", clock).holds(1)
    dead = Engine(runtime, "dead", clock).holds(0, missing=8)
    assert dead.ask(8) == 0
    giver.give(8)
    assert lender.ask(8) == 0, "eight are another's"
    die(dead.account)
    assert lender.ask(8) == 8


def test_a_large_demand_is_shown_whole_while_it_is_leased_in_slices(runtime: Runtime, clock: Clock) -> None:
    """The giver is busy and wants all memory; it may not lease back memory that the taker waits for."""
    giver = Engine(runtime, "giver", clock).holds(10, cached=44, missing=10)
    taker = Engine(runtime, "taker", clock).holds(0, missing=40)
    assert taker.ask(10) == 10
    assert not taker.view.refused(), "the next slice is leased at once"
    assert giver.asked[0] == 24, "asked for all that is missing, by the first slice"
    assert taker.ask(8) == 0 and not taker.view.refused()
    giver.give(30)
    assert taker.ask(8) == 8
    assert giver.ask(16) == 0, "the taker's requests need it"
    assert taker.ask(22) == 22 and not taker.view.refused()
    assert giver.ask(1) == 0 and giver.view.refused()
    assert taker.account._own["demand_bytes"] == taker.account._own["coming_bytes"] == 0


def test_a_demand_dropped_between_two_slices_is_no_demand(runtime: Runtime, clock: Clock) -> None:
    taker = Engine(runtime, "taker", clock).holds(0, missing=40)
    assert taker.ask(32) == 32
    assert picture(runtime).owners[0].demand_bytes == 8 * GRANULE
    taker.account.refuse(0)
    assert picture(runtime).owners[0].demand_bytes == picture(runtime).owners[0].coming_bytes == 0
    assert [event.kind for event in read(runtime.device("host"))] == ["lease", "ready"]
