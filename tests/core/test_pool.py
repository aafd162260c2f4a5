"""The pool against a plain model, with fences and memory in the test's hands."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcached_core.driver.host import HostDriver
from kvcached_core.errors import CapacityError, DriverError, InvariantError
from kvcached_core.geometry import Geometry, make_geometry
from kvcached_core.pages import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS
from kvcached_core.plan import Plan
from kvcached_core.pool import ElasticPool
from tests.fakes import FakeAccount, FakeDriver
from tests.faults import FaultyDriver
from tests.report import record

GRANULES = 12


def two_segments() -> Geometry:
    """Return 12 granules of 2 pages of 128 bytes, 3 blocks of 40 bytes each; a tail that no page fills."""
    return make_geometry(128, 40, (0, 1600), 40, 64)


class PoolMachine(RuleBasedStateMachine):
    """A scheduler that keeps to its budget, and a world that does not care."""

    @initialize(segments=st.sampled_from([1, 2]))
    def build(self, segments: int) -> None:
        self.geometry = make_geometry(
            128, 128, tuple(i * 128 * GRANULES for i in range(segments)), GRANULES, 64
        )
        self.unit = self.geometry.granule_bytes
        self.driver = FakeDriver(GRANULES * self.unit, patience=3)
        self.account = FakeAccount(self.unit, GRANULES * self.unit)
        self.pool = ElasticPool(self.driver, self.geometry, self.account, private_bytes=lambda: 7)
        self.live = {0}
        self.let_go = 0
        self.sequence = 0
        self.now = 0.0
        self.steps = 0
        self.last: Plan | None = None

    @rule(data=st.data())
    def a_step_with_a_plan(self, data: st.DataObject) -> None:
        unmap = data.draw(st.sets(st.sampled_from(sorted(self.live - {0})))) if len(self.live) > 1 else set()
        kept = self.live - unmap
        budget = self.account.created_granules - self.let_go
        let_go = data.draw(st.integers(0, max(0, budget - len(kept))))
        room = budget - let_go - len(kept)
        fresh = sorted(set(range(GRANULES)) - self.live)
        new = data.draw(st.lists(st.sampled_from(fresh), max_size=max(0, room), unique=True)) if fresh else []
        self.let_go += let_go
        plan = Plan(self.sequence, tuple(unmap), tuple(new), self.let_go)
        creates = self.driver.creates
        self.pool.apply(plan, stream=1)
        assert self.driver.creates == creates, "I5: a plan never needs a create"
        self.live = kept | set(new)
        self.sequence += 1
        self.last = plan
        self.driver.launch(offset for g in self.live for offset in self.geometry.ranges(g))

    @rule()
    def the_same_plan_again_changes_nothing(self) -> None:
        before = self.pool.stats()
        if self.last is not None:
            self.pool.apply(self.last, stream=1)
        assert self.pool.stats() == before

    @rule(bad=st.sampled_from(["gap", "null", "unmapped", "mapped", "outside", "twice"]))
    def a_plan_that_is_not_legal_changes_nothing(self, bad: str) -> None:
        free = next((g for g in range(GRANULES) if g not in self.live), None)
        mapped = max(self.live)
        unmap, new = {
            "gap": ((), ()),
            "null": ((0,), ()),
            "unmapped": ((GRANULES - 1 if free is None else free,) * (2 if free is None else 1), ()),
            "mapped": ((), (mapped,)),
            "outside": ((), (GRANULES,)),
            "twice": ((), (free, free) if free is not None else (0,)),
        }[bad]
        before = self.pool.stats()
        with pytest.raises(InvariantError):
            self.pool.apply(Plan(self.sequence + (bad == "gap"), unmap, new, self.let_go))
        assert self.pool.stats() == before

    @rule(granules=st.integers(0, GRANULES + 3))
    def the_scheduler_wants(self, granules: int) -> None:
        self.account.want(granules)

    @rule(rung=st.booleans(), later=st.sampled_from([0.0, 0.001, 0.02, 0.5]))
    def a_turn(self, rung: bool, later: float) -> None:
        self.now += later
        timeout = self.pool.supply_thread.turn(self.now, rung)
        if self.pool.stats().pending:
            assert timeout is not None and timeout <= 0.001
        unmet = self.account.wanted_bytes - self.account.leased_bytes >= self.unit
        if unmet:
            assert timeout is not None, "I10: nobody waits for ever while it has demand"
            assert timeout <= LAST_RETRY_SECONDS

    @rule(work=st.integers(1, 5))
    def the_device_gets_on(self, work: int) -> None:
        self.driver.complete(self.driver.completed + work)

    @rule(granules=st.integers(0, GRANULES))
    def outsiders_take_or_leave_memory(self, granules: int) -> None:
        self.driver.capacity_bytes = granules * self.unit + self.unit // 2

    @rule(granules=st.integers(1, GRANULES))
    def the_limit_changes(self, granules: int) -> None:
        self.account.limit_bytes = granules * self.unit

    @rule(calls=st.integers(1, 4))
    def the_ledger_is_busy(self, calls: int) -> None:
        self.account.busy = calls

    @precondition(lambda self: self.pool.stats().pending == 0)
    @rule()
    def with_room_and_calm_every_wish_is_met(self) -> None:
        """I10, the other half: enough turns with enough memory, and the wish is there."""
        self.driver.capacity_bytes = self.account.limit_bytes = 4 * GRANULES * self.unit
        self.account.busy = 0
        for _ in range(4):
            self.now += 1.0
            self.pool.supply_thread.turn(self.now)
        owed = max(0, self.let_go - self.pool.stats().released)
        assert self.account.leased_bytes + owed * self.unit >= self.account.wanted_bytes
        assert self.account.demand_bytes < self.unit

    @invariant()
    def i2_i7_i8_the_books_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.steps += 1
        self.pool.check()
        stats = self.pool.stats()
        assert stats.mapped == len(self.live)
        pages = len(self.geometry.starts)
        assert len(self.driver.book.sizes) == (stats.created - stats.released) * pages, "I8: whole granules"
        assert len(self.driver.book.mappings) == (stats.mapped + stats.pending) * pages
        assert stats.released <= self.let_go
        assert self.account.created_granules <= stats.created, "a granule is published once it exists"
        assert stats.created - stats.released <= self.account.leased_bytes // self.unit

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.account.busy = 0
        self.pool.close()
        self.pool.close()
        self.pool.check()
        assert not self.driver.book.sizes and not self.driver.book.ranges, "I11"
        assert (self.account.leased_bytes, self.account.ready_bytes) == (0, 0), "I11"
        self.account.close()
        record("pool.steps", self.steps)
        record("pool.examples", 1)


PoolMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


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
    driver.launch()
    pool.apply(Plan(1, (1,), (), 0), stream=1, also=(2,))
    assert pool.supply_thread.turn(0.0) == 0.001
    assert pool.stats().pending == 1
    driver.complete(driver.launched)
    assert pool.supply_thread.turn(0.0) is None
    assert pool.stats() == (2, 0, 1, 0, 3, 0)
    assert (account.published, account.maps, account.unmaps) == ((512, 0), 3, 1)


def test_a_granule_mapped_again_cancels_its_unmap(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = grown(account, driver, 2)
    pool.apply(Plan(0, (), (1,), 0))
    pool.apply(Plan(1, (1,), (), 0))
    mappings = dict(driver.book.mappings)
    pool.apply(Plan(2, (), (1,), 0))
    driver.complete(driver.launched)
    assert pool.retire() == 0
    assert driver.book.mappings == mappings
    assert pool.stats().mapped == 2


def test_a_map_without_a_spare_takes_over_the_oldest_pending_unmap(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20, patience=5)
    pool = grown(account, driver, 3)
    pool.apply(Plan(0, (), (1, 2), 0))
    driver.launch()
    pool.apply(Plan(1, (1, 2), (7,), 0))
    assert pool.stats() == (2, 1, 0, 0, 3, 0)
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
    pool.apply(Plan(0, (), (), 2))
    account.want(2)
    pool.supply_thread.turn(0.0)
    assert driver.held_bytes() == 2 * 256
    assert (account.leased_bytes, account.ready_bytes, account.released_granules) == (512, 512, 2)


def test_what_a_busy_ledger_was_not_told_is_told_in_the_next_turn(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = grown(account, driver, 4)
    account.want(2)
    pool.apply(Plan(0, (), (), 2))
    account.busy = 4  # acknowledge, and each telling of a release
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
    # 1 + 1 granules of 2 pages; the 6th page failed and took the 5th with it
    assert driver.held_bytes() == 2 * 256
    assert (account.leased_bytes, account.ready_bytes, account.demand_bytes) == (512, 512, 512)
    assert pool.supply_thread.turn(0.001, rung=False) == pytest.approx(FIRST_RETRY_SECONDS - 0.001)
    assert pool.supply_thread.turn(FIRST_RETRY_SECONDS, rung=False) is None
    assert (driver.held_bytes(), account.demand_bytes) == (1024, 0)


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
    assert not driver.book.ranges and not driver.book.sizes
    assert account.leased_bytes == 0


def test_warm_up_puts_memory_behind_every_byte_and_takes_it_away(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ElasticPool(driver, two_segments(), account)
    ((base, reserved),) = driver.book.ranges.items()
    before = dict(driver.book.mappings)
    pool.begin_warm_up()
    end = base
    for address, page in sorted(driver.book.mappings.items()):
        assert address == end
        end += page.size_bytes
    assert end == base + reserved >= base + 3200
    with pytest.raises(InvariantError):
        pool.apply(Plan(0, (), (1,), 0))
    pool.end_warm_up()
    assert driver.book.mappings == before
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
    assert not driver.book.sizes


def test_steps_and_the_thread_together_on_real_memory() -> None:
    """The thread grows, retires and releases while steps map, write, read and unmap."""
    page, count = 16384, 64
    geometry = make_geometry(page, page, (0,), count, 4096)
    driver, account = HostDriver(count * page), FakeAccount(page, count * page, notify_at=16)
    pool = ElasticPool(driver, geometry, account)
    pool.start()
    account.want(16)
    assert account.reached.wait(30), "the thread makes what is wanted"
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
