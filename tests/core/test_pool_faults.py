"""Every verb of the driver fails at every call of a worker's life, once and for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from devkit.report import record
from kvcached_core.driver.base import Driver
from kvcached_core.driver.host import HostDriver
from kvcached_core.errors import CapacityError, DriverError, InvariantError, KVCachedError
from kvcached_core.geometry import Geometry, make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver

PAGE = 8192
VERBS = ("memory", "reserve", "unreserve", "create", "clean", "release", "map", "alias", "unmap")
OTHER_VERBS = ("tensor", "record", "passed", "synchronize", "close")


def no_room() -> KVCachedError:
    """Return the error of a driver that has no room."""
    return CapacityError("injected: no room")


def broken() -> KVCachedError:
    """Return the error of a driver that is broken."""
    return DriverError("injected", 999, "broken")


def geometry() -> Geometry:
    """Return 6 granules of two pages, with a gap behind each segment."""
    return make_geometry(PAGE, 4096, (0, 13 * 4096), 13, 4096)


def host() -> Driver:
    """Return a driver of real memory."""
    return HostDriver(64 * PAGE)


def fake() -> Driver:
    """Return the strict fake driver, whose fences pass at the third query."""
    return FakeDriver(64 * PAGE, patience=2)


class Life:
    """A worker's life: start, warm-up, growth, steps, shrinking, end. It goes on after a driver's error."""

    def __init__(self, driver: Driver) -> None:
        self.faulty = FaultyDriver(driver)
        self.account = FakeAccount(2 * PAGE, 64 * PAGE)
        self.pool: ElasticPool | None = None
        self.errors: list[KVCachedError] = []
        self.now = 0.0

    def attempt(self, call: Callable[[], Any]) -> None:
        """Make a call. If an injected error stops it, repeat it without faults: the error changed nothing."""
        try:
            call()
        except (CapacityError, DriverError) as error:
            self.errors.append(error)
            self.check()
            if not self.faulty.forever:
                call()
        self.check()

    def check(self) -> None:
        """Check the pool's counts and the number of live handles."""
        if self.pool is None:
            return
        self.pool.check()
        if not self.faulty.injected:
            stats = self.pool.stats()
            scratch = sum(len(arena._scratch) for arena in self.pool._arenas._arenas)
            assert len(self.handles()) == 2 * (stats.created - stats.released) + scratch

    def handles(self) -> dict[int, int]:
        """Return the live handles of the driver underneath."""
        sizes: dict[int, int] = getattr(self.faulty.inner, "table", None) or self.faulty.inner._table  # type: ignore[attr-defined]
        return sizes.sizes  # type: ignore[attr-defined,no-any-return]

    def turns(self, count: int) -> None:
        """Take turns of the supply thread in this thread."""
        assert self.pool is not None
        for _ in range(count):
            self.now += 1.0
            self.pool.supply_thread.turn(self.now)
            self.check()

    def start(self) -> None:
        """Make the pool."""
        self.pool = ElasticPool(self.faulty.driver, geometry(), self.account)

    def apply(self, plan: Plan) -> None:
        """Apply a plan, unless an earlier plan or growth failed for good and the plan is no longer legal."""
        assert self.pool is not None
        stats, plans = self.pool.stats(), self.pool._plans
        budget = stats.created - plan.released
        legal = plan.sequence == plans._next_sequence and all(map(plans.is_live, plan.unmap))
        if legal and stats.mapped - len(plan.unmap) + len(plan.map) <= budget:
            self.attempt(lambda: self.pool.apply(plan, stream=1))  # type: ignore[union-attr]

    def live(self) -> None:
        """Go through all stages but the end."""
        self.attempt(self.start)
        if self.pool is None:
            return
        pool = self.pool
        self.attempt(pool.begin_warm_up)
        self.attempt(pool.end_warm_up)
        if pool._arenas.is_warming_up:
            return  # the warm-up could not be ended, so the engine would not start
        self.account.want(5)
        self.turns(2)
        self.apply(Plan(0, (), (1, 2, 3), 0))
        self.apply(Plan(1, (1, 3), (4,), 0))
        self.turns(3)
        self.apply(Plan(2, (4,), (5, 1, 3), 0))
        self.apply(Plan(3, (5, 1), (4,), 1))
        self.account.want(4)
        self.turns(4)
        self.apply(Plan(4, (4,), (), 2))
        self.turns(4)

    def end(self) -> None:
        """Close the pool and check that nothing is left (I11)."""
        if self.pool is not None:
            try:
                self.pool.close()
            except (CapacityError, DriverError, InvariantError):
                assert self.faulty.injected
                self.faulty.inner.close()
        else:
            self.faulty.inner.close()
        assert not self.handles()
        assert (self.account.leased_bytes, self.account.ready_bytes) == (0, 0)
        self.account.close()


def fault_free(make: Callable[[], Driver]) -> Life:
    """Return a life that has run to its end without faults."""
    life = Life(make())
    life.live()
    life.end()
    return life


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("error", [no_room, broken])
@pytest.mark.parametrize("make", [fake, host])
@pytest.mark.parametrize("verb", [*VERBS, *OTHER_VERBS])
def test_i8_i11_nth_call_failing_changes_nothing_and_leaks_nothing(
    verb: str, make: Callable[[], Driver], error: Callable[[], KVCachedError], forever: bool
) -> None:
    calls = fault_free(make).faulty.calls[verb]
    assert calls, f"the life never calls {verb}"
    injected = 0
    for nth in range(1, calls + 1):
        life = Life(make())
        life.faulty.verb, life.faulty.nth, life.faulty.forever = verb, nth, forever
        life.faulty.error = error
        life.live()
        life.end()
        injected += life.faulty.injected
    assert injected >= calls - 1  # after a first failure the life may be shorter
    record("driver.injected_failures", injected)


def test_a_life_without_faults_reaches_every_state() -> None:
    life = fault_free(fake)
    assert not life.errors
    assert all(life.faulty.calls[verb] for verb in (*VERBS, *OTHER_VERBS))
    assert life.account.created_granules >= 5 and life.account.released_granules >= 2
