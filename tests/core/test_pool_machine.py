"""The pool against a plain model: every order of steps, turns, faults and the device's progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devkit.report import record
from kvcached_core.errors import CapacityError, DriverError, InvariantError
from kvcached_core.geometry import make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.backoff import LAST_RETRY_SECONDS
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver

GRANULES = 12

# (verb, n): the n-th next call of this verb fails; None: no call fails.
FAULTS = st.none() | st.tuples(
    st.sampled_from(["map", "unmap", "record", "passed", "own_stream", "follow"]), st.integers(1, 4)
)


def broken() -> DriverError:
    """Return the error of a driver that is broken."""
    return DriverError("injected", 999, "broken")


class PoolMachine(RuleBasedStateMachine):
    """A scheduler that keeps to its budget, while faults, limits and outsiders come at any time."""

    @initialize(segments=st.sampled_from([1, 2]))
    def build(self, segments: int) -> None:
        self.geometry = make_geometry(
            128, 128, tuple(i * 128 * GRANULES for i in range(segments)), GRANULES, 64
        )
        self.unit = self.geometry.granule_bytes
        self.driver = FakeDriver(GRANULES * self.unit, patience=3)
        self.account = FakeAccount(self.unit, GRANULES * self.unit)
        self.faulty = FaultyDriver(self.driver, error=broken)
        self.pool = ElasticPool(self.faulty.driver, self.geometry, self.account, private_bytes=lambda: 7)
        self.live = {0}
        self.let_go = 0
        self.sequence = 0
        self.now = 0.0
        self.steps = 0
        self.last: Plan | None = None

    def attempt(self, call: Callable[[], object], fault: tuple[str, int] | None) -> bool:
        """Make a call in which the driver may fail; return whether the call succeeded."""
        if fault is not None:
            self.faulty.verb, self.faulty.nth = fault[0], self.faulty.calls[fault[0]] + fault[1]
        try:
            call()
        except DriverError:
            assert fault is not None
            self.pool.check()
            return False
        finally:
            self.faulty.heal()
        return True

    @rule(data=st.data(), fault=FAULTS, early=st.booleans())
    def a_step_with_a_plan(self, data: st.DataObject, fault: tuple[str, int] | None, early: bool) -> None:
        unmap = data.draw(st.sets(st.sampled_from(sorted(self.live - {0})))) if len(self.live) > 1 else set()
        kept = self.live - unmap
        budget = self.counted_on() - self.let_go
        let_go = data.draw(st.integers(0, max(0, budget - len(kept))))
        room = budget - let_go - len(kept)
        fresh = sorted(set(range(GRANULES)) - self.live)
        new = data.draw(st.lists(st.sampled_from(fresh), max_size=max(0, room), unique=True)) if fresh else []
        self.let_go += let_go
        plan = Plan(self.sequence, tuple(unmap), tuple(new), self.let_go)
        creates = self.driver.creates
        if not self.attempt(lambda: self.pool.apply(plan, stream=1), fault):
            if early:
                self.pool.background.unmap_deferred()
                self.pool.background.premap()
            self.pool.apply(plan, stream=1)
        assert self.driver.creates == creates, "I5: a plan never needs a create"
        self.live = kept | set(new)
        self.sequence += 1
        self.last = plan
        # Zero before use: the fake checks that the step waits for the zeroing of every page it touches.
        self.driver.launch((o for g in self.live for o in self.geometry.ranges(g)), stream=1)

    def counted_on(self) -> int:
        """Return how many granules the scheduler counts on; lift its cap once the surplus is gone."""
        account = self.account
        if account.created_granules <= account.created_most:
            account.created_most = 0
        return account.created_most or account.created_granules

    @rule(data=st.data())
    def another_rank_made_fewer_and_no_more_is_wanted(self, data: st.DataObject) -> None:
        least = self.let_go + len(self.live)
        self.account.created_most = data.draw(st.integers(least, max(least, self.counted_on())))

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
        calm = not self.account.busy
        timeout = self.pool.supply_thread.turn(self.now, rung)
        stats = self.pool.stats()
        surplus = self.account.created_most and stats.created - max(
            self.account.created_most, stats.released + 1
        )
        if stats.deferred or ((stats.released < self.let_go or surplus > 0) and stats.premapped):
            assert timeout is not None and timeout <= 0.001, "nothing else will call"
        elif calm and self.account.wanted_bytes <= self.account.leased_bytes:
            assert timeout is None, "an idle thread does not spin"
        unmet = self.account.wanted_bytes - self.account.leased_bytes >= self.unit
        if unmet and not self.account.created_most:
            assert timeout is not None, "I10: a rank with demand never waits for ever"
            assert timeout <= LAST_RETRY_SECONDS

    @rule(fault=FAULTS)
    def the_thread_places_ahead(self, fault: tuple[str, int] | None) -> None:
        self.attempt(self.pool.background.premap, fault)

    @rule(fault=FAULTS)
    def the_thread_unmaps(self, fault: tuple[str, int] | None) -> None:
        self.attempt(self.pool.background.unmap_deferred, fault)

    @rule()
    def the_thread_releases(self) -> None:
        self.pool._handles.release_owed()

    @rule(work=st.integers(1, 5))
    def the_device_gets_on(self, work: int) -> None:
        self.driver.complete(self.driver.completed + work)

    @rule(work=st.integers(1, 5))
    def the_device_zeroes(self, work: int) -> None:
        self.driver.complete_own(self.driver.own.completed + work)

    @rule()
    def warm_up_again(self) -> None:
        """Kernels may touch any block, premapped ones too; granules premapped later still read zero."""
        with suppress(CapacityError):
            self.pool.begin_warm_up()
        if not self.pool._arenas.is_warming_up:
            return  # no room for scratch memory
        assert not self.pool.background.premap() and not self.pool.stats().premapped
        self.driver.launch()
        self.pool.end_warm_up()

    @rule(granules=st.integers(0, GRANULES))
    def outsiders_take_or_leave_memory(self, granules: int) -> None:
        self.driver.capacity_bytes = granules * self.unit + self.unit // 2

    @rule(granules=st.integers(1, GRANULES))
    def the_limit_changes(self, granules: int) -> None:
        self.account.limit_bytes = granules * self.unit

    @rule(calls=st.integers(1, 4))
    def the_ledger_is_busy(self, calls: int) -> None:
        self.account.busy = calls

    @precondition(lambda self: self.pool.stats().deferred == 0)
    @rule()
    def with_room_and_calm_every_wish_is_met(self) -> None:
        """I10, the other half: with enough turns and memory, the rank gets all that its scheduler wants."""
        self.driver.capacity_bytes = self.account.limit_bytes = 4 * GRANULES * self.unit
        self.driver.complete_own(self.driver.own.launched)
        self.account.busy = 0
        self.now += 1.0
        self.pool.supply_thread.turn(self.now)
        most = self.account.created_most
        assert not most or self.account.created_granules <= most, "granules above the cap were withdrawn"
        self.counted_on()
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
        assert len(self.driver.table.sizes) == (stats.created - stats.released) * pages, "I8: whole granules"
        assert len(self.driver.table.mappings) == (stats.mapped + stats.deferred + stats.premapped) * pages
        assert stats.released <= self.let_go
        if not self.account.created_most:
            assert self.account.created_granules <= stats.created, "a granule is published once it exists"
        assert stats.created - stats.released <= self.account.leased_bytes // self.unit

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.account.busy = 0
        self.pool.close()
        self.pool.close()
        self.pool.check()
        assert not self.driver.table.sizes and not self.driver.table.ranges, "I11"
        assert (self.account.leased_bytes, self.account.ready_bytes) == (0, 0), "I11"
        self.account.close()
        record("pool.steps", self.steps)
        record("pool.examples", 1)


PoolMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
