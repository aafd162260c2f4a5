"""Threads wait briefly for the interpreter lock while memory moves, and as long as usual otherwise."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvcached_core.gil import SWITCH_SECONDS, short_waits
from kvcached_core.plan import Plan
from kvcached_core.worker.lease_account import MappingStats
from kvcached_core.worker.supply_thread import SupplyThread
from kvcached_core.worker.supply_turn import StatsPublisher, SupplyTurn
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.small_pool import ready

BOUND_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    assert sys.getswitchinterval() == before
    sys.setswitchinterval(before)


def test_waits_are_short_inside_and_as_before_outside_whatever_happens() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), short_waits():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        with short_waits():
            pass
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS), "another thread is still inside"
        raise KeyError
    assert sys.getswitchinterval() == before


def test_an_interval_that_is_shorter_already_stays() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(10e-6)
    try:
        with short_waits():
            assert sys.getswitchinterval() == pytest.approx(10e-6)
        assert sys.getswitchinterval() == pytest.approx(10e-6)
    finally:
        sys.setswitchinterval(before)


def test_a_step_waits_shortly_while_it_carries_out_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step makes driver calls too: while another thread unpacks requests, each call could cost it 5 ms."""
    driver, seen = FakeDriver(1 << 20), list[float]()
    pool, place = ready(FakeAccount(256, 1 << 20), driver, 3), driver.map

    def look(*arguments: Any) -> None:
        seen.append(sys.getswitchinterval())
        place(*arguments)

    monkeypatch.setattr(driver, "map", look)
    pool.apply(Plan(0, (), (1, 2), 0))
    assert seen == [pytest.approx(SWITCH_SECONDS)] * len(seen) != []


def test_the_supply_thread_waits_shortly_in_its_turns_only() -> None:
    account = FakeAccount(256, 1 << 20)
    pool = ready(account, FakeDriver(1 << 20), 1)
    seen: list[float] = []
    at_work: list[bool] = []
    looked = threading.Event()

    def usage() -> MappingStats:
        seen.append(sys.getswitchinterval())
        at_work.append(thread.is_at_work)
        looked.set()
        return MappingStats(0, 0, 0)

    publisher = StatsPublisher(account, usage, lambda: 0)
    turn = SupplyTurn(account, pool._handles, pool._growth, pool.background, publisher)
    thread = SupplyThread(account, turn)
    assert not thread.is_at_work
    thread.start()
    assert looked.wait(BOUND_SECONDS)
    thread.stop()
    account.close()
    assert all(at_work) and not thread.is_at_work, "an idle loop beside it makes way"
    assert seen and all(interval == pytest.approx(SWITCH_SECONDS) for interval in seen)
