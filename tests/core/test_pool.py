"""The pool, with fences and free memory set by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.driver.host import HostDriver
from kvcached_core.errors import CapacityError, DriverError, InvariantError
from kvcached_core.geometry import Geometry, make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.backoff import FIRST_RETRY_SECONDS
from kvcached_core.worker.pool import ElasticPool
from kvcached_core.worker.pool_stats import PoolStats
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver
from tests.small_pool import ROW, offsets, ready


def two_segments() -> Geometry:
    """Return 12 granules of 2 pages of 128 bytes, 3 blocks of 40 bytes each; a tail that no page fills."""
    return make_geometry(128, 40, (0, 1600), 40, 64)


@pytest.fixture
def account() -> Iterator[FakeAccount]:
    """Return an account for two_segments()."""
    account = FakeAccount(256, 100 * 256)
    yield account
    account.close()


def grown(account: FakeAccount, driver: FakeDriver, granules: int) -> ElasticPool:
    """Return a pool that holds some granules, the first one mapped."""
    pool = ElasticPool(driver, two_segments(), account)
    account.want(granules)
    pool.supply_thread.turn(0.0)
    return pool


def test_i6_page_is_unmapped_only_after_its_fences(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = grown(account, driver, 3)
    pool.apply(Plan(0, (), (1, 2), 0), stream=1)
    driver.launch(stream=1)
    pool.apply(Plan(1, (1,), (), 0), stream=1, also=(2,))
    assert pool.supply_thread.turn(0.0) == 0.001
    assert pool.stats().deferred == 1
    driver.complete(driver.launched)
    assert pool.supply_thread.turn(0.0) is None
    assert pool.stats() == PoolStats(
        mapped=2, deferred=0, premapped=1, spare=0, moving=0, created=3, released=0
    )
    assert (account.published, account.maps, account.unmaps) == ((768, 0), 4, 1)


def test_i6_a_fence_that_passed_is_not_asked_for_again_and_the_next_plans_is(account: FakeAccount) -> None:
    """Each query releases Python's lock, and the engine's loop may then keep it."""
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver)
    pool = ready(account, faulty, 1 + 3 * ROW)
    last = 3 * ROW
    pool.apply(Plan(0, (), tuple(range(1, last + 1)), 0), stream=1)
    pool.apply(Plan(1, tuple(range(1, 2 * ROW + 1)), (), 0), stream=1)
    driver.complete(driver.launched)
    driver.launch(offsets(last), stream=1)
    pool.apply(Plan(2, (last,), (), 0), stream=1)
    before = faulty.calls["passed"]
    assert pool.background.unmap_deferred() == 1
    assert faulty.calls["passed"] - before == 2, "once for two rows, and once for the other plan"
    driver.complete(driver.launched)
    assert pool.background.unmap_deferred() == 0


def test_a_granule_mapped_again_cancels_its_unmap(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = grown(account, driver, 2)
    pool.apply(Plan(0, (), (1,), 0))
    pool.apply(Plan(1, (1,), (), 0))
    mappings = dict(driver.table.mappings)
    pool.apply(Plan(2, (), (1,), 0))
    driver.complete(driver.launched)
    assert pool.background.unmap_deferred() == 0
    assert driver.table.mappings == mappings
    assert pool.stats().mapped == 2


def test_a_map_without_a_spare_takes_over_the_oldest_pending_unmap(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20, patience=5)
    pool = grown(account, driver, 3)
    pool.apply(Plan(0, (), (1, 2), 0))
    driver.launch()
    pool.apply(Plan(1, (1, 2), (7,), 0))
    stats = pool.stats()
    assert (stats.mapped, stats.deferred, stats.premapped, stats.spare, stats.created) == (2, 1, 0, 0, 3)
    assert driver.completed >= 1
    pool.check()


def test_i5_a_plan_over_the_handles_is_an_invariant_error(account: FakeAccount) -> None:
    pool = grown(account, FakeDriver(1 << 20), 2)
    with pytest.raises(InvariantError, match="I5"):
        pool.apply(Plan(0, (), (1, 2), 0))
    pool.check()


def test_owed_handles_are_released_only_when_ordered(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = grown(account, driver, 4)
    pool.supply_thread.turn(0.0)
    assert driver.held_bytes() == 4 * 256
    driver.complete_own(driver.own.launched)
    pool.apply(Plan(0, (), (), 2))
    account.want(2)
    pool.supply_thread.turn(0.0)
    assert driver.held_bytes() == 2 * 256
    assert (account.leased_bytes, account.ready_bytes, account.released_granules) == (512, 512, 2)


def test_what_a_busy_ledger_was_not_told_is_told_in_the_next_turn(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = grown(account, driver, 4)
    driver.complete_own(driver.own.launched)
    account.want(2)
    pool.apply(Plan(0, (), (), 2))
    account.busy = 3  # acknowledge, the report of the release, publish
    assert pool.supply_thread.turn(0.0) == FIRST_RETRY_SECONDS
    assert (driver.held_bytes(), account.leased_bytes) == (512, 1024), "over-counted, not under-counted"
    assert pool.supply_thread.turn(FIRST_RETRY_SECONDS, rung=False) is None
    assert (account.leased_bytes, account.ready_bytes) == (512, 512)


def test_i8_a_failed_create_keeps_whole_granules_and_becomes_demand(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver, "create", nth=6, error=lambda: CapacityError("taken by others"))
    pool = ElasticPool(faulty.driver, two_segments(), account)
    account.want(4)
    assert pool.supply_thread.turn(0.0) == FIRST_RETRY_SECONDS
    # 1 + 1 granules of 2 pages; the 6th page failed, so the 5th was freed again
    assert driver.held_bytes() == 2 * 256
    assert (account.leased_bytes, account.ready_bytes, account.demand_bytes) == (512, 512, 512)
    assert pool.supply_thread.turn(0.001, rung=False) == pytest.approx(FIRST_RETRY_SECONDS - 0.001)
    assert pool.supply_thread.turn(FIRST_RETRY_SECONDS, rung=False) is None
    assert (driver.held_bytes(), account.demand_bytes) == (1024, 0)


class WithdrawingAccount(FakeAccount):
    """An account whose scheduler wants nothing more after the `at`-th lease."""

    at = 2

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        granted = super().lease(want_bytes, memory)
        if self.leases == self.at:
            self.wanted_bytes = self.granule_bytes
        return granted


@pytest.mark.parametrize("denied", [False, True])
def test_a_wish_withdrawn_while_it_is_leased_is_no_demand(denied: bool) -> None:
    account = WithdrawingAccount(256, 100 * 256)
    pool = ElasticPool(FakeDriver(1 << 20), two_segments(), account)
    account.want(70)
    account.denied = denied
    wait = pool.supply_thread.turn(0.0)  # the first granule was the first lease
    for _ in range(3):
        wait = pool.supply_thread.turn(1.0, rung=False)
    assert wait is None and account.demand_bytes == 0
    assert account.leased_bytes == (1 if denied else 33) * 256
    account.close()


def test_unmet_demand_is_retried_ever_more_slowly(account: FakeAccount) -> None:
    pool = grown(account, FakeDriver(1 << 20), 1)
    account.denied = True
    account.want(5)
    now, waits = 0.0, []
    for _ in range(6):
        wait = pool.supply_thread.turn(now, rung=False)
        assert wait is not None
        waits.append(wait)
        now += wait
    assert waits == [0.02, 0.04, 0.08, 0.16, 0.2, 0.2]
    leases = account.leases
    pool.supply_thread.turn(now - 0.1, rung=True)
    assert account.leases == leases + 1, "the bell does not wait for the timer"
    account.denied = False
    assert pool.supply_thread.turn(now + 1, rung=False) is None
    assert account.demand_bytes == 0


def test_a_driver_failure_ends_growth_but_not_the_engine(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver, "create", nth=3, error=lambda: DriverError("create", 999, "broken"))
    pool = ElasticPool(faulty.driver, two_segments(), account)
    account.want(3)
    assert pool.supply_thread.turn(0.0) is None
    assert pool.supply_thread.turn(1.0) is None
    assert faulty.calls["create"] == 3
    assert account.leased_bytes == account.ready_bytes == 256
    pool.apply(Plan(0, (), (), 0))
    pool.check()


def test_first_lease_refused_says_the_numbers_and_leaves_nothing(account: FakeAccount) -> None:
    driver = FakeDriver(200)
    with pytest.raises(CapacityError, match="200 B of 200 B are free"):
        ElasticPool(driver, two_segments(), account)
    assert not driver.table.ranges and not driver.table.sizes
    assert account.leased_bytes == 0


def test_warm_up_puts_memory_behind_every_byte_and_takes_it_away(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ElasticPool(driver, two_segments(), account)
    ((base, reserved),) = driver.table.ranges.items()
    before = dict(driver.table.mappings)
    pool.begin_warm_up()
    end = base
    for address, page in sorted(driver.table.mappings.items()):
        assert address == end
        end += page.size_bytes
    assert end == base + reserved >= base + 3200
    with pytest.raises(InvariantError):
        pool.apply(Plan(0, (), (1,), 0))
    pool.end_warm_up()
    assert driver.table.mappings == before
    assert driver.held_bytes() == 256


def test_a_failure_in_the_thread_is_raised_on_the_step_path(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver)
    ended = threading.Event()

    def private_bytes() -> int:
        ended.set()
        raise RuntimeError("a bug")

    pool = ElasticPool(faulty.driver, two_segments(), account, private_bytes=private_bytes)
    pool.start()
    assert ended.wait(10)
    pool.supply_thread.stop()
    with pytest.raises(InvariantError, match="a bug"):
        pool.apply(Plan(0, (), (), 0))
    pool.close()
    assert not driver.table.sizes


def test_steps_and_the_thread_together_on_real_memory() -> None:
    """The thread grows, unmaps and releases while steps map, write, read and unmap."""
    page, count = 16384, 64
    geometry = make_geometry(page, page, (0,), count, 4096)
    driver, account = HostDriver(count * page), FakeAccount(page, count * page, notify_at=16)
    pool = ElasticPool(driver, geometry, account)
    pool.start()
    account.want(16)
    assert account.reached.wait(30), "the thread creates the wanted granules"
    sequence, let_go, live = 0, 0, list[int]()
    for step in range(600):
        budget = account.created_granules - let_go - 1
        old = tuple(live[: len(live) // 2])
        live = live[len(old) :]
        release = 1 if step % 5 == 0 and budget > 8 else 0
        let_go += release
        room = budget - release - len(live)
        new = tuple(g for g in range(1 + step % 7, count, 7) if g not in live and g not in old)[
            : max(0, room)
        ]
        pool.apply(Plan(sequence, old, new, let_go))
        sequence += 1
        live += new
        for granule in new:
            view = pool.tensor[granule * page : (granule + 1) * page]
            assert int(view.count_nonzero()) == 0
            view.fill_(1)
        account.want(12 + step % 9)
    pool.check()
    assert sequence == 600 and let_go > 0
    pool.close()
    assert (account.leased_bytes, account.ready_bytes) == (0, 0)
    account.close()
