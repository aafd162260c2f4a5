"""The scheduler's view of the ledger."""

from __future__ import annotations

import fcntl
import os
import threading
import time

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.errors import BusyError, LedgerError
from kvcached_core.ledger import (
    Runtime,
    SchedulerView,
    check,
    set_limit,
    snapshot,
)
from tests.ledger.helpers import (
    CAPACITY,
    GRANULE,
    PLENTY,
    attach,
    die,
    engine_usage,
    hold,
    leave,
    picture,
    readable,
)

GPU = DeviceIdentity("GPU-0", "gpu")


def rung(*descriptors: int) -> int:
    """Return how many of the bells were rung."""
    return readable(*descriptors)


def test_the_view_shows_the_minimum_over_ranks(runtime: Runtime) -> None:
    a, b = attach(runtime, "a", 0, limit_bytes=9 * GRANULE), attach(runtime, "a", 1, device=GPU)
    view = SchedulerView.find(runtime, "a", 2)
    hold(a, 5)
    hold(b, 3)
    assert (view.created(), view.granule_limit(), view.refused()) == (3, 9, False)
    assert [geometry.granule_bytes for geometry in view.geometry] == [GRANULE, GRANULE]
    b.lease(CAPACITY, PLENTY)
    assert view.refused()


def test_i2_a_rank_ahead_of_the_others_frees_its_surplus_and_the_count_never_falls(
    runtime: Runtime,
) -> None:
    far, least = attach(runtime, "a", 0), attach(runtime, "a", 1, device=GPU)
    view = SchedulerView.find(runtime, "a", 2)
    hold(far, 5)
    hold(least, 3)
    view.publish(engine_usage(0, 0, 0, wanted_granules=5, released_granules=0))
    assert (far.created_most, least.created_most) == (0, 0), "the others are on their way"
    view.publish(engine_usage(0, 0, 0, wanted_granules=2, released_granules=1))
    assert (far.created_most, least.created_most) == (3, 0)
    hold(least, 1)
    assert view.created() == 3, "what is to go is not counted on any more"
    far.drain()
    far.give_back(granules_withdrawn=2)
    assert view.created() == 3 and far.created_most == 0, "done: all that is there counts again"
    assert rung(far.fileno()) == 1, "it may grow again"
    assert far.leased_bytes == far.ready_bytes == 3 * GRANULE
    far.check()
    assert [check(device) for device in snapshot(runtime)] == [[], []]


def test_a_reclaim_from_a_rank_that_is_ahead_takes_its_surplus(
    runtime: Runtime,
) -> None:
    far, least = attach(runtime, "a", 0), attach(runtime, "a", 1, device=GPU)
    view = SchedulerView.find(runtime, "a", 2)
    hold(far, 9)
    hold(least, 3)
    assert view.created() == 3
    view.publish(engine_usage(wanted_granules=20, released_granules=1))
    far._slot.set("target_bytes", 5 * GRANULE)
    far._slot.set("asked_until_ms", 1 << 50)
    assert (view.target_granules(), far.created_most) == (5, 6), "it may hold five, and one is released"
    far.give_back(granules_released=1, granules_withdrawn=3)
    assert (view.created(), far.created_most, far.leased_bytes) == (3, 0, 5 * GRANULE)
    set_limit(runtime, "m", 1 * GRANULE)
    assert (view.granule_limit(), far.created_most) == (1, 3), "what is counted on goes by plans alone"


def test_a_single_rank_is_never_ordered_to_withdraw(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    hold(account, 5)
    view.publish(engine_usage(0, 0, 0, wanted_granules=1, released_granules=0))
    assert account.created_most == 0


def test_an_order_to_withdraw_ends_with_the_surplus(runtime: Runtime) -> None:
    far, least = attach(runtime, "a", 0), attach(runtime, "a", 1, device=GPU)
    view = SchedulerView.find(runtime, "a", 2)
    hold(far, 5)
    hold(least, 3)
    view.publish(engine_usage(0, 0, 0, wanted_granules=3, released_granules=0))
    assert far.created_most == 3
    for account, gone, more in ((far, 4, 1), (least, 2, 3)):  # the ranks fell asleep
        account.give_back(granules_released=gone)
        account.recount(more)
    assert view.created() == 6 and far.created_most == 0


def test_published_usage_is_shown_and_read_by_the_worker(runtime: Runtime) -> None:
    accounts = [attach(runtime, "a", rank) for rank in range(2)]
    view = SchedulerView.find(runtime, "a", 2)
    view.publish(engine_usage(8, 5, 3, wanted_granules=6, released_granules=2))
    view.count(evictions=4, preemptions=1, busy=True, idle_since_ms=0)
    block = GRANULE // 4
    for account, owner in zip(accounts, picture(runtime).owners, strict=True):
        assert account.wanted_bytes == 6 * GRANULE
        assert (owner.used_bytes, owner.cached_bytes, owner.stranded_bytes) == (
            8 * block,
            5 * block,
            3 * block,
        )
        assert (owner.ordered_granules, owner.evictions, owner.preemptions, owner.busy) == (2, 4, 1, 1)


def test_i2_a_lower_limit_holds_for_the_scheduler_at_once_a_higher_one_when_applied(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    hold(account, 20)
    set_limit(runtime, "m", 5 * GRANULE)
    assert view.granule_limit() == 5
    assert account.limit_bytes == CAPACITY
    account.acknowledge()
    set_limit(runtime, "m", 30 * GRANULE)
    assert view.granule_limit() == 5
    account.acknowledge()
    assert view.granule_limit() == 30


def test_i2_above_a_lowered_limit_leases_only_fall(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    set_limit(runtime, "m", 5 * GRANULE)
    assert account.lease(GRANULE, PLENTY) == 0
    seen = []
    for granules in (0, 8, 4, 4):
        account.give_back(granules_released=granules)
        account.check()
        (owner,) = picture(runtime).owners
        got = account.lease(GRANULE, PLENTY)
        seen.append((owner.leased_bytes // GRANULE, owner.ceiling_bytes // GRANULE, got // GRANULE))
    assert seen == [(20, 20, 0), (12, 12, 0), (8, 8, 0), (4, 5, 1)]


def test_the_view_names_missing_ranks(runtime: Runtime) -> None:
    attach(runtime, "a", 1)
    with pytest.raises(LedgerError, match=r"instance a with rank 0, 2 .*has ended, or works with another"):
        SchedulerView.find(runtime, "a", 3)
    with pytest.raises(LedgerError, match="instance b with rank 0"):
        SchedulerView.find(runtime, "b", 1)


def test_the_view_says_that_its_worker_is_gone(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    leave(account)
    for call in (view.created, view.granule_limit, lambda: view.publish(engine_usage())):
        with pytest.raises(LedgerError, match="instance a with rank 0"):
            call()


def test_the_view_does_not_take_the_slot_of_another_for_its_own(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    die(account)
    newcomer = attach(runtime, "b")
    assert newcomer.slot == account.slot
    with pytest.raises(LedgerError):
        view.publish(engine_usage(wanted_granules=7))
    assert newcomer.wanted_bytes == 0


def test_the_view_and_the_snapshot_need_no_lock(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    fd = os.open(runtime.device("host").lock, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert (view.created(), view.granule_limit()) == (0, 64)
        view.publish(engine_usage(wanted_granules=3))
        assert account.wanted_bytes == 3 * GRANULE
        assert picture(runtime).owners[0].live
        account.acknowledge()
        with pytest.raises(BusyError):
            set_limit(runtime, "m", GRANULE)
    finally:
        os.close(fd)


def test_reading_the_budget_takes_microseconds(runtime: Runtime) -> None:
    attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    rounds, best = 2000, 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(rounds):
            view.created()
            view.granule_limit()
        best = min(best, (time.perf_counter() - start) / rounds)
    assert best < 10e-6  # 2 us on an idle machine


def test_a_snapshot_of_a_busy_ledger_is_settled_or_says_that_it_is_not(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            account.created(account.lease(4 * GRANULE, PLENTY) // GRANULE)
            account.publish(account.ready_bytes, 0)
            account.give_back(granules_released=account.ready_bytes // GRANULE)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(300):
            for device in snapshot(runtime):
                assert check(device) == []
    finally:
        stop.set()
        thread.join()
