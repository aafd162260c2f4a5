"""A pool that sleeps: it holds one granule and leases nothing; afterwards all ranks have equal counts."""

from __future__ import annotations

import pytest

from kvcached_core.driver.base import Driver
from kvcached_core.errors import DriverError, InvariantError
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver
from tests.small_pool import COUNT, GEOMETRY, PAGE, ready

GRANULE = 2 * PAGE


def account_of(granules: int = COUNT) -> FakeAccount:
    return FakeAccount(GRANULE, granules * GRANULE)


def check_empty(pool: ElasticPool, account: FakeAccount, driver: FakeDriver) -> None:
    """Check that granule 0 is all that is left, by every count."""
    pool.check()
    stats = pool.stats()
    assert (stats.mapped, stats.deferred, stats.premapped, stats.spare, stats.moving) == (1, 0, 0, 0, 0)
    assert account.leased_bytes == account.ready_bytes == account.published[0] == GRANULE
    assert driver.memory().total_bytes - driver.memory().free_bytes == GRANULE
    assert account.created_granules - account.released_granules == 1
    assert (account.created_granules, account.released_granules) == (stats.created, stats.released)


@pytest.mark.parametrize("premapped", [False, True])
@pytest.mark.parametrize("mapped", [0, 7])
@pytest.mark.parametrize("unmapped", [0, 3])
def test_mapped_deferred_premapped_and_spare_granules_are_freed_but_the_first(
    premapped: bool, mapped: int, unmapped: int
) -> None:
    driver, account = FakeDriver(COUNT * GRANULE), account_of()
    pool = ready(account, driver, 20)
    pool.apply(Plan(0, (), tuple(range(1, 1 + mapped)), 0))
    pool.apply(Plan(1, tuple(range(1, 1 + min(unmapped, mapped))), (), 0))
    if premapped:
        pool.background.premap()
    pool.sleep.begin()
    check_empty(pool, account, driver)
    pool.sleep.begin()
    check_empty(pool, account, driver)
    pool.close()


def test_what_was_ordered_and_not_yet_freed_is_freed_once() -> None:
    driver, account = FakeDriver(COUNT * GRANULE), account_of()
    pool = ready(account, driver, 20)
    pool.apply(Plan(0, (), (1, 2, 3, 4), 0))
    pool.apply(Plan(1, (2, 3), (), 9))
    pool.sleep.begin()
    check_empty(pool, account, driver)
    assert pool.stats().released == 19
    pool.close()


def test_a_pool_that_sleeps_wants_nothing_and_grows_as_usual_when_it_wakes() -> None:
    driver, account = FakeDriver(COUNT * GRANULE), account_of()
    pool = ready(account, driver, 20)
    pool.sleep.begin()
    account.want(30)
    pool.sleep.take_turn()
    assert account.demand_bytes == 0
    check_empty(pool, account, driver)
    pool.sleep.end()
    pool.sleep.take_turn()
    assert account.ready_bytes == 30 * GRANULE
    pool.apply(Plan(0, (), (1, 2), 19))
    pool.check()
    pool.close()


def test_a_plan_that_comes_while_it_sleeps_is_refused() -> None:
    driver, account = FakeDriver(COUNT * GRANULE), account_of()
    pool = ready(account, driver, 2)
    pool.sleep.begin()
    with pytest.raises(InvariantError, match="came while the pool sleeps"):
        pool.apply(Plan(0, (), (1,), 0))
    pool.sleep.end()
    pool.close()


def test_granules_are_counted_as_made_and_freed_so_that_all_ranks_agree() -> None:
    driver, account = FakeDriver(COUNT * GRANULE), account_of()
    pool = ready(account, driver, 5)
    pool.sleep.begin()
    pool.sleep.recount(12)
    check_empty(pool, account, driver)
    assert (pool.stats().created, pool.stats().released) == (12, 11)
    with pytest.raises(InvariantError, match="12 granules were made, not 11"):
        pool.sleep.recount(11)
    pool.sleep.end()
    account.want(4)
    pool.sleep.take_turn()
    pool.apply(Plan(0, (), (1, 2, 3), 11))
    account.want(2)
    pool.apply(Plan(1, (1, 2, 3), (), 13))
    driver.synchronize()
    pool.sleep.take_turn()
    pool.check()
    assert account.created_granules == 15 and account.released_granules == 13
    pool.close()


def test_a_growth_that_is_under_way_is_given_back_too() -> None:
    """The supply thread may be creating granules while the engine falls asleep."""
    driver, account = FakeDriver(COUNT * GRANULE), FakeAccount(GRANULE, COUNT * GRANULE, notify_at=8)
    pool = ElasticPool(driver, GEOMETRY, account)
    pool.start()
    account.want(COUNT)
    assert account.reached.wait(10)
    pool.sleep.begin()
    check_empty(pool, account, driver)
    pool.sleep.take_turn()
    check_empty(pool, account, driver)
    pool.close()


@pytest.mark.parametrize("verb", ["unmap", "release"])
def test_if_the_driver_fails_no_plan_is_carried_out_any_more(verb: str) -> None:
    """Part of the memory that the scheduler counts on is gone, so no step may write to it."""
    inner = FakeDriver(COUNT * GRANULE)
    driver = FaultyDriver(inner, verb, 2, forever=True, error=lambda: DriverError(verb, 1, "broken"))
    pool = ready(account_of(), driver, 9)
    pool.apply(Plan(0, (), (1, 2, 3, 4), 0))
    with pytest.raises(DriverError, match="granules are still there"):
        pool.sleep.begin()
    pool.sleep.end()
    with pytest.raises(InvariantError, match="has ended"):
        pool.apply(Plan(1, (), (5,), 0))
    driver.heal()
    pool.close()


def test_a_device_that_does_not_finish_its_work_is_not_waited_for_for_ever() -> None:
    class Stuck(FakeDriver):
        def passed(self, fence: object) -> bool:
            return False

    driver: Driver = Stuck(COUNT * GRANULE)
    times = iter(range(0, 1000, 10))
    pool = ElasticPool(driver, GEOMETRY, account_of(), clock=lambda: float(next(times)))
    pool._handles._account.want(3)  # type: ignore[attr-defined]
    pool.sleep.take_turn()
    pool.apply(Plan(0, (), (1,), 0))
    with pytest.raises(DriverError, match="granules are still there"):
        pool.sleep.begin()
