"""The thread that maps ahead of need: in its turns, beside a step, and at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from kvcached_core.errors import BusyError, CapacityError
from kvcached_core.geometry import make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.backoff import FIRST_RETRY_SECONDS
from kvcached_core.worker.handle_growth import SLICE_GRANULES
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import OWN_STREAM, FakeDriver
from tests.faults import FaultyDriver
from tests.small_pool import COUNT, GEOMETRY, PAGE, offsets, ready


def at_last(condition: Callable[[], bool]) -> None:
    """Wait until another thread has made the condition true, 10 seconds at most."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "the other thread did not get there"


class ForgetfulLedger(FakeAccount):
    """A ledger that is busy whenever new handles are reported to it."""

    deaf = True

    def created(self, granules: int) -> None:
        if self.deaf and self.created_granules:
            raise BusyError("deaf")
        super().created(granules)


def test_i2_what_the_ledger_does_not_know_to_be_ready_is_not_mapped_ahead() -> None:
    account = ForgetfulLedger(2 * PAGE, COUNT * 2 * PAGE)
    pool = ElasticPool(FakeDriver(1 << 20), GEOMETRY, account)
    account.want(4)
    assert pool.supply_thread.turn(0.0) == FIRST_RETRY_SECONDS
    assert pool.stats()[:4] == (1, 0, 0, 3)
    account.deaf = False
    assert pool.supply_thread.turn(FIRST_RETRY_SECONDS, rung=False) is None
    assert pool.stats()[:4] == (1, 0, 3, 0)
    pool.check()
    account.close()


def test_a_turn_that_only_unmaps_maps_ahead_and_then_the_thread_sleeps(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ready(account, driver, 3)
    pool.apply(Plan(0, (), (1, 2), 0))
    driver.launch(offsets(0, 1, 2))
    pool.apply(Plan(1, (2,), (), 0))
    assert pool.supply_thread.turn(0.0, rung=False) == 0.001
    driver.complete(driver.launched)
    leases = account.leases
    assert pool.supply_thread.turn(0.0, rung=False) is None
    assert account.leases == leases and pool._premapped.granules() == {2}
    maps = account.maps
    assert pool.supply_thread.turn(1.0, rung=False) is None
    assert account.maps == maps, "it does not move granules that are premapped already"


def test_a_turn_maps_a_slice_so_that_orders_never_wait_long(account: FakeAccount) -> None:
    pool = ready(account, FakeDriver(1 << 20, patience=1), 90)
    turns: list[float | None] = []
    while not turns or turns[-1] is not None:
        turns.append(pool.supply_thread.turn(0.0, rung=False))
        assert pool.stats().premapped == min(len(turns) * SLICE_GRANULES, 89)
    assert turns == [0.0, 0.0, None]


def test_a_failure_ahead_of_need_is_told_once_and_tried_again_when_the_bell_rings(
    account: FakeAccount, caplog: pytest.LogCaptureFixture
) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver, "map", error=lambda: CapacityError("no room"), forever=True)
    pool = ready(account, faulty, 3)
    faulty.nth = faulty.calls["map"] + 1
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert pool.supply_thread.turn(0.0, rung=False) is None, "it does not spin either"
    assert faulty.injected == 1 and len(caplog.records) == 1
    assert pool.supply_thread.turn(0.0, rung=True) is None
    assert faulty.injected == 2
    faulty.heal()
    assert pool.supply_thread.turn(0.0, rung=True) is None
    assert pool.stats().premapped == 2


class HeldDriver(FakeDriver):
    """Stops in the n-th map on its own stream until it may go on; keeps the streams of all maps."""

    def __init__(self, nth: int) -> None:
        super().__init__(1 << 20)
        self.nth = nth
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.streams: list[int] = []

    def map(self, address: int, page_bytes: int, handles: Sequence[int], stream: int = 0) -> None:
        self.streams.append(stream)
        if self.streams.count(OWN_STREAM) == self.nth and stream == OWN_STREAM:
            self.inside.set()
            assert self.go_on.wait(10)
        super().map(address, page_bytes, handles, stream)


def test_a_step_waits_for_one_row_at_most(account: FakeAccount) -> None:
    driver = HeldDriver(nth=1)
    pool = ready(account, driver, 20)
    driver.streams.clear()
    thread = threading.Thread(target=pool.background.premap)
    step = threading.Thread(target=lambda: pool.apply(Plan(0, (), (9,), 0), stream=5))
    thread.start()
    assert driver.inside.wait(10)
    step.start()
    at_last(pool._lock.step_first.locked)
    driver.go_on.set()
    thread.join(10)
    step.join(10)
    assert driver.streams[:4] == [OWN_STREAM, OWN_STREAM, 5, 5], "granule 1, then the step's, then the rest"
    assert pool.stats()[:4] == (2, 0, 18, 0)
    pool.check()


class WatchedLock:
    """A lock that shows when a thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked = threading.Event()

    def __enter__(self) -> None:
        self.asked.set()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("work", ["premap", "unmap_deferred"])
def test_the_thread_stands_behind_a_step_that_waits(account: FakeAccount, work: str) -> None:
    driver = FakeDriver(1 << 20, patience=0)
    pool = ready(account, driver, 4)
    pool.apply(Plan(0, (), (1,), 0))
    pool.apply(Plan(1, (1,), (), 0))
    before, lock = pool.stats(), WatchedLock()
    pool._lock.step_first = lock  # type: ignore[assignment]
    with lock:  # a step holds it from before it takes `changed` until its plan is applied
        lock.asked.clear()
        thread = threading.Thread(target=getattr(pool.background, work))
        thread.start()
        assert lock.asked.wait(10)
        assert pool.stats() == before
    thread.join(10)
    assert not thread.is_alive() and pool.stats() != before


@pytest.mark.parametrize("nth", [1, 2, 5, 6])
def test_i11_close_while_the_thread_maps_ahead_leaves_nothing(account: FakeAccount, nth: int) -> None:
    driver = HeldDriver(nth)
    pool = ready(account, driver, 10)
    pool.start()
    assert driver.inside.wait(10)
    closing = threading.Thread(target=pool.close)
    closing.start()
    at_last(lambda: pool.supply_thread._stopping)
    driver.go_on.set()
    closing.join(10)
    assert not driver.table.sizes and not driver.table.mappings and not driver.table.ranges
    assert (account.leased_bytes, account.ready_bytes) == (0, 0)
    pool.check()


@pytest.mark.parametrize(
    ("segments", "batches"),
    [(1, [1, *(1, 1, 2, 4, 8, 16), *(1, 1, 2, 4, 3)]), (16, [1, 1, 1, 2, *[4] * 7, 1, 1, 2, 4, 3])],
)
def test_the_ledger_hears_of_the_first_granules_at_once_and_of_many_seldom(
    segments: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is never more work than a step should wait for."""
    told: list[int] = []
    account = FakeAccount(64 * segments, 1 << 20)
    created = account.created

    def note(granules: int) -> None:
        told.append(granules)
        created(granules)

    monkeypatch.setattr(account, "created", note)
    geometry = make_geometry(64, 64, [4096 * segment for segment in range(segments)], 64, 64)
    pool = ElasticPool(FakeDriver(1 << 20), geometry, account)
    assert told == [1]
    account.want(1 + 43)
    pool.supply_thread.turn(0.0)
    pool.supply_thread.turn(0.0)
    assert told == batches
    assert account.ready_bytes == account.leased_bytes
    account.close()
