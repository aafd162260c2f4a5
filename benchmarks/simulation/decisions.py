"""Measure the cost of one decision: a lease among N owners.

Times are processor times of the thread, so other programs on the machine do not count. No other process takes
the ledger's lock here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Account, EngineUsage, Runtime, SchedulerView

GRANULE = 1 << 20
EACH = 32  # granules of an owner's equal share
_DEVICE = DeviceIdentity("SIMULATED-1", "simulated")


def lease_microseconds(owners: int, repeats: int) -> dict[str, list[float]]:
    """Return the times of leases among `owners` owners.

    `free`: there is memory for all. `contested`: the other owners hold all memory, and the lease asks them to
    give up all memory that they do not need.
    """
    memory = MemoryInfo(EACH * owners * GRANULE, EACH * owners * GRANULE)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvcached-decisions-") as folder:
        runtime = Runtime(Path(folder))
        accounts = [_attach(runtime, number, memory.total_bytes) for number in range(owners)]
        views = [SchedulerView.find(runtime, f"owner-{number}", 1) for number in range(owners)]
        first = accounts[0]

        def free() -> None:
            first.lease(GRANULE, memory)

        def undo() -> None:
            first.give_back(bytes_never_ready=GRANULE)

        found = {"free": _time(free, undo, repeats)}
        _hold(first, 1, memory)
        left = memory.total_bytes // GRANULE - 1
        for at, account in enumerate(accounts[1:]):
            _hold(account, left * (at + 1) // (owners - 1) - left * at // (owners - 1), memory)
        usage = EngineUsage(
            used_blocks=4 * EACH, cached_blocks=0, stranded_blocks=0, mapped_granules=EACH,
            wanted_granules=2 * EACH, needed_granules=2 * EACH, released_granules=0, enough_granules=2 * EACH,
        )  # fmt: skip
        for view in views:
            view.publish(usage)
            view.count(0, 0, True, 0)
        found["contested"] = _time(lambda: first.lease(EACH * GRANULE, memory), first.drain, repeats)
        for account, view in zip(accounts, views, strict=True):
            view.close()
            account.give_back(granules_released=account.ready_bytes // GRANULE)
            account.detach()
    return found


def _attach(runtime: Runtime, number: int, capacity_bytes: int) -> Account:
    name = f"owner-{number}"
    account = Account.attach(runtime, _DEVICE, capacity_bytes, 0, instance=name, rank=0, name=name)
    granules = capacity_bytes // GRANULE
    account.describe(
        page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=granules, blocks_per_granule=4,
        block_count=4 * granules, stride_bytes=GRANULE // 4,
    )  # fmt: skip
    return account


def _hold(account: Account, granules: int, memory: MemoryInfo) -> None:
    got = account.lease(granules * GRANULE, memory)
    assert got == granules * GRANULE, "there is memory for all"
    account.created(granules)


def _time(call: Callable[[], object], between: Callable[[], object], repeats: int) -> list[float]:
    """Return the microseconds of each call, without the first calls, which warm up."""
    found = []
    for _ in range(repeats + repeats // 10):
        begin = time.thread_time()
        call()
        found.append((time.thread_time() - begin) * 1e6)
        between()
    return found[-repeats:]
