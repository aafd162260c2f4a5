"""Ranks of one engine on several devices grow in step, so two engines never wait for each other's memory."""

from __future__ import annotations

import random
import select

import pytest

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Account, Runtime, SchedulerView
from kvcached_core.ledger.peers import LEAD_GRANULES
from tests.ledger.helpers import GRANULE, attach, die, engine_usage, leave

TOTAL = 256
DEVICES = (DeviceIdentity("GPU-b", "b"), DeviceIdentity("GPU-a", "a"))  # rank 1's device is first in order
PLENTY = MemoryInfo(TOTAL * GRANULE, TOTAL * GRANULE)


def engine(runtime: Runtime, name: str, wanted: int) -> list[Account]:
    """Attach an engine with a rank on each device, whose scheduler wants `wanted` granules."""
    accounts = [
        attach(runtime, name, rank=rank, name=name, device=device, capacity_bytes=TOTAL * GRANULE)
        for rank, device in enumerate(DEVICES)
    ]
    view = SchedulerView.find(runtime, name, len(DEVICES))
    view.publish(engine_usage(needed_granules=wanted, wanted_granules=wanted))
    view.close()
    for account in accounts:
        account.grow_with(range(len(DEVICES)))
    return accounts


def leased(account: Account) -> int:
    return account.leased_bytes // GRANULE


def lease(account: Account) -> int:
    """Take a turn as a supply thread does; return the granules granted."""
    unmet = account.wanted_bytes - account.leased_bytes
    if unmet <= 0:
        account.refuse(0)
        return 0
    granted = account.lease(min(unmet, 32 * GRANULE), PLENTY) // GRANULE
    account.created(granted)
    return granted


def obey(runtime: Runtime, name: str, accounts: list[Account]) -> None:
    """Give back the memory that is asked for, the same on every rank, as a scheduler orders it."""
    view = SchedulerView.find(runtime, name, len(accounts))
    target = view.target_granules()
    view.close()
    surplus = min(leased(account) for account in accounts) - target
    if target and surplus > 0:
        for account in accounts:
            account.give_back(granules_released=surplus)


def test_the_first_device_leads_by_a_slice_and_the_others_follow(runtime: Runtime) -> None:
    follower, leader = engine(runtime, "a", wanted=100)
    assert lease(follower) == 0, "it has nobody to follow yet"
    assert [lease(leader), lease(leader)] == [LEAD_GRANULES, 0]
    assert lease(follower) == LEAD_GRANULES
    while lease(leader) + lease(follower):
        pass
    assert (leased(leader), leased(follower)) == (100, 100)
    for account in (follower, leader):
        leave(account)


def test_a_rank_that_may_grow_again_is_rung(runtime: Runtime) -> None:
    follower, leader = engine(runtime, "a", wanted=100)
    for account in (leader, follower):
        account.drain()
    lease(leader)
    assert rang(follower) and not rang(leader)
    lease(follower)
    assert rang(leader)
    for account in (follower, leader):
        leave(account)


def rang(account: Account) -> bool:
    poller = select.poll()
    poller.register(account.fileno(), select.POLLIN)
    return bool(poller.poll(0))


@pytest.mark.parametrize("seed", range(20))
def test_two_engines_on_the_same_devices_neither_deadlock_nor_starve(runtime: Runtime, seed: int) -> None:
    chance = random.Random(seed)
    engines = {name: engine(runtime, name, wanted=200) for name in ("a", "b")}
    turns = [account for accounts in engines.values() for account in accounts]
    for _ in range(200):
        lease(chance.choice(turns))
        if chance.random() < 0.3:
            name = chance.choice(list(engines))
            obey(runtime, name, engines[name])
    for _ in range(40):  # no more random turns: every engine asks and obeys
        for account in turns:
            lease(account)
        for name, accounts in engines.items():
            obey(runtime, name, accounts)
    usable = {name: min(map(leased, accounts)) for name, accounts in engines.items()}
    stranded = {name: max(map(leased, accounts)) - usable[name] for name, accounts in engines.items()}
    assert max(stranded.values()) <= LEAD_GRANULES
    assert min(usable.values()) >= TOTAL // 2 - LEAD_GRANULES
    for account in turns:
        leave(account)


def test_a_dead_rank_holds_nobody_back(runtime: Runtime) -> None:
    follower, leader = engine(runtime, "a", wanted=100)
    die(leader)
    leave(attach(runtime, "next", name="next", device=DEVICES[1], capacity_bytes=TOTAL * GRANULE))
    assert lease(follower) == 32
    leave(follower)


def test_a_missing_rank_is_named(runtime: Runtime) -> None:
    account = attach(runtime, "a", device=DEVICES[0], capacity_bytes=TOTAL * GRANULE)
    with pytest.raises(LedgerError, match="rank 1"):
        account.grow_with(range(2))
    leave(account)
