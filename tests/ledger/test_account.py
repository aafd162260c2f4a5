"""A few accounts on one device, used one after the other."""

from __future__ import annotations

import os
import threading

import pytest

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import CapacityError, InvariantError, LedgerError
from kvcached_core.ledger import Account, Runtime, check
from kvcached_core.ledger.file import layout
from kvcached_core.worker.lease_account import LeaseAccount
from tests.ledger.helpers import (
    CAPACITY,
    GRANULE,
    HOST,
    PLENTY,
    attach,
    die,
    files,
    hold,
    leave,
    picture,
    readable,
)

TOTAL = CAPACITY // GRANULE


def rung(account: Account) -> bool:
    """Return whether the worker's doorbell was rung, and empty it."""
    ready = readable(account.fileno())
    account.drain()
    return bool(ready)


def test_no_ledger_is_written_that_a_reader_would_call_damaged(runtime: Runtime) -> None:
    with pytest.raises(InvariantError, match=f"no ledger of {CAPACITY} bytes with a headroom of"):
        attach(runtime, "a", headroom_bytes=CAPACITY + 1)
    assert not runtime.device("host").ledger.exists()
    attach(runtime, "a", headroom_bytes=CAPACITY)
    assert check(picture(runtime)) == []


def test_account_has_the_calls_that_the_supply_thread_makes(runtime: Runtime) -> None:
    account: LeaseAccount = attach(runtime, "a")
    assert account.granule_bytes == GRANULE
    assert (account.leased_bytes, account.ready_bytes, account.wanted_bytes) == (0, 0, 0)


def test_a_snapshot_shows_an_attached_owner(runtime: Runtime) -> None:
    attach(runtime, "a", rank=3, name="llama", floor_bytes=2 * GRANULE, limit_bytes=9 * GRANULE)
    (owner,) = picture(runtime).owners
    assert (owner.instance, owner.rank, owner.name, owner.engine, owner.model) == (
        "a",
        3,
        "llama",
        "test 1",
        "tiny",
    )
    assert (owner.limit_bytes, owner.floor_bytes, owner.weight_applied) == (9 * GRANULE, 2 * GRANULE, 100)
    assert (owner.page_bytes, owner.granule_bytes, owner.granule_count) == (GRANULE, GRANULE, TOTAL)
    assert owner.live and owner.written and owner.worker_pid == os.getpid()


def test_i2_lease_create_publish_release(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    assert account.lease(5 * GRANULE + 7, PLENTY) == 5 * GRANULE
    account.created(3)
    account.give_back(bytes_never_ready=2 * GRANULE)
    account.publish(2 * GRANULE, 11, maps=2)
    account.check()
    account.give_back(granules_released=1)
    account.check()
    (owner,) = picture(runtime).owners
    assert (owner.mapped_bytes, owner.ready_bytes, owner.leased_bytes) == (2 * GRANULE,) * 3
    assert (owner.created_granules, owner.released_granules) == (3, 1)
    assert (owner.leases, owner.lease_bytes, owner.refusals) == (1, 5 * GRANULE, 1)
    assert (owner.maps, owner.unmaps, owner.create_failures, owner.private_now_bytes) == (2, 0, 1, 11)


@pytest.mark.parametrize(
    ("limit", "headroom", "free", "peak", "granted"),
    [
        (TOTAL, 0, TOTAL, 0, TOTAL - 10),  # the other has leased 10, of which 6 are ready
        (TOTAL, 3, TOTAL, 0, TOTAL - 13),
        (5, 0, TOTAL, 0, 5),
        (TOTAL, 0, 20, 0, 16),  # 4 of the free granules are promised to the other account
        (TOTAL, 3, 20, 0, 13),
        (TOTAL, 0, 20, 7, 9),  # and it may still take 7 outside its KV cache
        (TOTAL, 0, 4, 0, 0),
        (TOTAL, 0, 0, 0, 0),
    ],
)
def test_a_lease_grants_the_least_of_all_bounds(
    runtime: Runtime, limit: int, headroom: int, free: int, peak: int, granted: int
) -> None:
    other = attach(runtime, "other", headroom_bytes=headroom * GRANULE)
    hold(other, 6)
    other.lease(4 * GRANULE, PLENTY)
    other.set_private_peak(peak * GRANULE)
    account = attach(runtime, "a", headroom_bytes=headroom * GRANULE, limit_bytes=limit * GRANULE)
    memory = MemoryInfo(free * GRANULE, CAPACITY)
    assert account.lease(CAPACITY, memory) == granted * GRANULE
    (_, owner) = picture(runtime).owners
    assert owner.demand_bytes == CAPACITY - granted * GRANULE
    assert check(picture(runtime)) == []


def test_private_use_up_to_the_peak_is_left_free_until_it_is_taken(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    account.set_private_peak(10 * GRANULE)
    account.publish(0, 8 * GRANULE)
    assert account.lease(CAPACITY, MemoryInfo(20 * GRANULE, CAPACITY)) == 18 * GRANULE


def test_i10_a_worker_that_is_short_is_rung_when_another_gives_back_or_leaves(runtime: Runtime) -> None:
    a, b = attach(runtime, "a"), attach(runtime, "b")
    hold(a, TOTAL)
    assert b.lease(GRANULE, PLENTY) == 0
    b.drain()
    assert not rung(b)
    a.give_back(granules_released=1)
    assert rung(b)
    assert b.lease(2 * GRANULE, PLENTY) == GRANULE
    b.drain()
    leave(a)
    assert rung(b)
    assert b.lease(GRANULE, PLENTY) == GRANULE
    b.created(2)
    b.refuse(0)
    assert picture(runtime).owners[0].demand_bytes == 0


def test_i10_the_memory_of_the_dead_is_granted_at_once(runtime: Runtime) -> None:
    a, b = attach(runtime, "a"), attach(runtime, "b")
    hold(a, TOTAL)
    die(a)
    assert [owner.live for owner in picture(runtime).owners] == [False, True]
    assert b.lease(CAPACITY, PLENTY) == CAPACITY


def test_i3_floors_over_the_capacity_are_refused_with_the_numbers(runtime: Runtime) -> None:
    first = attach(runtime, "a", floor_bytes=40 * GRANULE)
    with pytest.raises(CapacityError, match=r"30 MiB does not fit.*holds 64 MiB.*40 MiB.*at most 24 MiB"):
        attach(runtime, "b", floor_bytes=30 * GRANULE)
    assert [owner.instance for owner in picture(runtime).owners] == ["a"]
    leave(first)
    attach(runtime, "b", floor_bytes=30 * GRANULE)


def test_i3_the_floor_of_the_dead_does_not_count(runtime: Runtime) -> None:
    die(attach(runtime, "a", floor_bytes=40 * GRANULE))
    attach(runtime, "b", floor_bytes=40 * GRANULE)


def test_i4_a_rank_cannot_attach_twice(runtime: Runtime) -> None:
    attach(runtime, "a")
    with pytest.raises(LedgerError, match="rank 0 of instance a is attached"):
        attach(runtime, "a")
    attach(runtime, "a", rank=1)


def test_i11_the_last_to_leave_leaves_only_ledger_and_lock(runtime: Runtime) -> None:
    accounts = [attach(runtime, name) for name in "abc"]
    assert len(files(runtime)) == 2 + 3 * 3
    for account in accounts:
        hold(account, 2)
        leave(account)
        account.detach()
    assert files(runtime) == {"ledger", "lock"}
    assert picture(runtime).owners == ()


def test_i11_leaving_with_memory_is_refused(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 1)
    with pytest.raises(InvariantError, match="1048576 bytes leased"):
        account.detach()
    assert picture(runtime).owners[0].live


def test_an_error_says_that_all_slots_are_taken(runtime: Runtime) -> None:
    accounts = [attach(runtime, f"i{n}", name=f"n{n}") for n in range(layout.SLOT_COUNT)]
    with pytest.raises(LedgerError, match="all 64 slots are taken"):
        attach(runtime, "one more")
    accounts[7].detach()
    assert attach(runtime, "one more").slot == 7


def test_impossible_numbers_are_refused(runtime: Runtime) -> None:
    account = Account.attach(runtime, HOST, CAPACITY, 0, instance="a", rank=0, name="m")
    with pytest.raises(InvariantError, match="before describe"):
        account.lease(GRANULE, PLENTY)
    other = attach(runtime, "b")
    with pytest.raises(InvariantError, match="of 0 leased"):
        other.created(1)
    hold(other, 1)
    with pytest.raises(InvariantError, match="ready"):
        other.publish(2 * GRANULE, 0)
    with pytest.raises(InvariantError, match="giving back"):
        other.give_back(granules_released=2)
    with pytest.raises(InvariantError, match="leased"):
        other.describe(
            page_bytes=1,
            granule_bytes=1,
            granule_count=1,
            blocks_per_granule=1,
            block_count=1,
            stride_bytes=1,
        )
    other.check()


def test_engines_already_there_decide_the_capacity(runtime: Runtime) -> None:
    first = attach(runtime, "a")
    second = attach(runtime, "b", capacity_bytes=2 * CAPACITY)
    assert second.capacity_bytes == second.limit_bytes == CAPACITY
    leave(first)
    leave(second)
    assert attach(runtime, "c", capacity_bytes=2 * CAPACITY).capacity_bytes == 2 * CAPACITY


def test_i1_threads_of_one_account_and_of_many_never_get_more_than_the_capacity(runtime: Runtime) -> None:
    accounts = [attach(runtime, f"i{n}", name=f"n{n}") for n in range(4)]
    failures: list[BaseException] = []
    rounds = 100

    def work(account: Account) -> None:
        try:
            for turn in range(rounds):
                got = account.lease((turn % 5 + 1) * 8 * GRANULE, PLENTY) // GRANULE
                account.created(got)
                account.publish(0, 0)
                account.give_back(granules_released=got)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(account,)) for account in (*accounts, accounts[0])]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen = picture(runtime)
        assert check(seen) == []
    for thread in threads:
        thread.join()
    assert failures == []
    for account in accounts:
        account.check()
