"""Limits, floors and weights set by tools, and waiting until they hold."""

from __future__ import annotations

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.errors import CapacityError
from kvcached_core.ledger import (
    NoSuchEngineError,
    Runtime,
    check,
    look,
    set_floor,
    set_limit,
    set_weight,
    wait_until_holds,
)
from kvcached_core.units import Size
from tests.ledger.helpers import CAPACITY, GRANULE, attach, die, hold, leave, picture

GPU = DeviceIdentity("GPU-0", "gpu")


def test_limits_in_percent_are_of_the_device(runtime: Runtime) -> None:
    a = attach(runtime, "a", 0)
    b = attach(runtime, "a", 1, device=GPU, capacity_bytes=2 * CAPACITY)
    changes = set_limit(runtime, "m", Size(percent=25.0))
    assert [change.limit_bytes for change in changes] == [CAPACITY // 2, CAPACITY // 4]
    (only,) = set_limit(runtime, "m", Size(percent=50.0), devices=["host"])
    assert (only.uuid, only.limit_bytes, only.generation) == ("host", CAPACITY // 2, 2)
    for account in (a, b):
        account.acknowledge()
    assert (a.limit_bytes, b.limit_bytes) == (CAPACITY // 2, CAPACITY // 2)


def test_a_limit_over_the_device_is_the_device(runtime: Runtime) -> None:
    attach(runtime, "a")
    (change,) = set_limit(runtime, "m", 99 * CAPACITY)
    assert change.limit_bytes == CAPACITY


def test_an_unknown_name_is_an_error_that_lists_the_names_in_use(runtime: Runtime) -> None:
    with pytest.raises(NoSuchEngineError, match="no engine is named m: none is running"):
        set_limit(runtime, "m", GRANULE)
    die(attach(runtime, "dead", name="dead"))
    attach(runtime, "a")
    for name in ("x", "dead"):
        with pytest.raises(NoSuchEngineError) as caught:
            set_limit(runtime, name, GRANULE)
        assert caught.value.names == ["m"]


def test_i3_a_tool_cannot_raise_floors_over_the_capacity(runtime: Runtime) -> None:
    a, b = attach(runtime, "a", name="a", floor_bytes=40 * GRANULE), attach(runtime, "b", name="b")
    set_floor(runtime, "a", 10 * GRANULE)
    with pytest.raises(CapacityError, match="does not fit on host"):
        set_floor(runtime, "b", 30 * GRANULE)  # engine a keeps its floor of 40 until it acknowledges 10
    a.acknowledge()
    set_floor(runtime, "b", 54 * GRANULE)
    b.acknowledge()
    assert [owner.floor_applied // GRANULE for owner in picture(runtime).owners] == [10, 54]
    assert check(picture(runtime)) == []


def test_a_weight_is_acknowledged(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    changes = set_weight(runtime, "m", 7)
    assert not look(runtime, changes, "weight")[0].holds
    account.acknowledge()
    assert look(runtime, changes, "weight")[0].holds
    assert picture(runtime).owners[0].weight_applied == 7


class Clock:
    """A clock that calls a function at each sleep."""

    def __init__(self, *events: object) -> None:
        self.now = 0.0
        self.events = list(events)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.events:
            event = self.events.pop(0)
            assert callable(event)
            event()


def test_waiting_ends_when_the_limit_is_acknowledged_and_nothing_is_above_it(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    changes = set_limit(runtime, "m", 5 * GRANULE)
    clock = Clock(account.acknowledge, lambda: account.give_back(granules_released=15))
    (outcome,) = wait_until_holds(runtime, changes, 5.0, clock=clock, sleep=clock.sleep)
    assert outcome.holds and outcome.leased_bytes == 5 * GRANULE
    assert clock.now < 0.1


def test_waiting_ends_when_the_time_is_up(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    changes = set_limit(runtime, "m", 5 * GRANULE)
    clock = Clock(account.acknowledge)
    (outcome,) = wait_until_holds(runtime, changes, 5.0, clock=clock, sleep=clock.sleep)
    assert outcome.acknowledged and not outcome.holds
    assert 5.0 <= clock.now < 5.1


def test_waiting_ends_when_the_engine_does(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    changes = set_limit(runtime, "m", 5 * GRANULE)
    clock = Clock(lambda: leave(account))
    (outcome,) = wait_until_holds(runtime, changes, 5.0, clock=clock, sleep=clock.sleep)
    assert outcome.gone and not outcome.holds


def test_i7_a_limit_below_one_granule_holds_with_the_one_that_stays(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 1)
    changes = set_limit(runtime, "m", 0)
    account.acknowledge()
    assert look(runtime, changes)[0].holds
