"""Premapped granules when a driver call fails."""

from __future__ import annotations

import pytest

from devkit.report import record
from kvcached_core.errors import CapacityError, DriverError, KVCachedError
from kvcached_core.plan import Plan
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver
from tests.small_pool import ROW, offsets, ready

PLACE = [("own_stream", 1), ("map", 1), ("map", 2), ("record", 1), ("map", 3), ("map", 4), ("record", 2)]


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("error", [CapacityError("no room"), DriverError("injected", 999, "broken")])
@pytest.mark.parametrize(("verb", "nth"), PLACE)
def test_i8_place_that_fails_loses_no_handle(
    account: FakeAccount, verb: str, nth: int, error: KVCachedError, forever: bool
) -> None:
    driver = FakeDriver(1 << 20, patience=2)
    faulty = FaultyDriver(driver, verb, error=lambda: error, forever=forever)
    pool = ready(account, faulty, 2 + 2 * ROW)
    for _ in range(2 if forever else 1):
        faulty.nth = faulty.calls[verb] + (1 if faulty.injected else nth)
        with pytest.raises(type(error)):
            pool.background.premap()
        stats = pool.stats()
        assert stats.mapped == 1 and stats.premapped + stats.spare == 1 + 2 * ROW
        assert len(driver.table.mappings) == 2 * (1 + stats.premapped), "whole granules"
        pool.check()
    faulty.heal()
    pool.apply(Plan(0, (), tuple(range(1, 2 + 2 * ROW)), 0))
    driver.launch(offsets(*range(2 + 2 * ROW)))
    assert pool.stats()[:4] == (2 + 2 * ROW, 0, 0, 0)
    pool.close()
    assert not driver.table.sizes and not driver.table.ranges
    record("driver.injected_failures", faulty.injected)


@pytest.mark.parametrize("verb", ["passed", "follow", "record"])
def test_i8_a_claim_that_fails_changes_nothing(account: FakeAccount, verb: str) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver, "record", error=lambda: DriverError("injected", 999, "broken"))
    pool = ready(account, faulty, 3)
    if verb == "record":  # the fence is still to be recorded: the claim does it
        faulty.nth = faulty.calls["record"] + 1
        with pytest.raises(DriverError):
            pool.background.premap()
    else:
        pool.background.premap()
    faulty.verb, faulty.nth = verb, faulty.calls[verb] + 1
    before = pool.stats()
    with pytest.raises(DriverError):
        pool.apply(Plan(0, (), (1,), 0))
    assert pool.stats() == before and 1 in pool._premapped
    pool.apply(Plan(0, (), (1,), 0))
    driver.launch(offsets(0, 1))
