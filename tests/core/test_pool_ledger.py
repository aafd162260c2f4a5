"""Pool, supply thread, ledger and doorbells together, on real memory."""

from __future__ import annotations

import select
from collections.abc import Callable
from pathlib import Path

from kvcached_core.driver.host import HostDriver
from kvcached_core.geometry import make_geometry
from kvcached_core.ledger import Account, Runtime, SchedulerView, snapshot
from kvcached_core.ledger.snapshot import OwnerSnapshot
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.ledger.helpers import engine_usage

PAGE, COUNT = 64 * 1024, 32


def shown(runtime: Runtime) -> OwnerSnapshot:
    """Return the ledger's snapshot of the owner."""
    return snapshot(runtime)[0].owners[0]


def wait_until(view: SchedulerView, condition: Callable[[], bool]) -> None:
    """Wait for the engine bell until a condition holds, 10 seconds at most."""
    poller = select.poll()
    for descriptor in view.filenos():
        poller.register(descriptor, select.POLLIN)
    for _ in range(1000):
        if condition():
            return
        poller.poll(10)
        view.drain()
    raise AssertionError("the thread did not get there")


def test_the_thread_grows_and_shrinks_by_the_doorbell(tmp_path: Path) -> None:
    runtime = Runtime.open(tmp_path / "run")
    driver = HostDriver(COUNT * PAGE)
    geometry = make_geometry(PAGE, PAGE // 2, (0,), 2 * COUNT, driver.granularity_bytes)
    account = Account.attach(runtime, driver.identity(), COUNT * PAGE, 0, instance="one", rank=0, name="one")
    account.describe(
        page_bytes=PAGE, granule_bytes=geometry.granule_bytes, granule_count=geometry.granule_count,
        blocks_per_granule=2, block_count=2 * COUNT, stride_bytes=PAGE // 2,
    )  # fmt: skip
    pool = ElasticPool(driver, geometry, account, private_bytes=lambda: 4096)
    pool.start()
    view = SchedulerView.find(runtime, "one", 1)
    view.publish(engine_usage(needed_granules=1, wanted_granules=9))
    wait_until(view, lambda: view.created() == 9)

    pool.apply(Plan(0, (), tuple(range(1, 9)), 0))
    pool.tensor[: 9 * PAGE].fill_(1)
    # The scheduler wants less before the plan arrives; else the thread would create the freed memory again.
    view.publish(engine_usage(needed_granules=1, wanted_granules=3, released_granules=6))
    pool.apply(Plan(1, tuple(range(3, 9)), (), 6))
    wait_until(view, lambda: account.leased_bytes == 3 * PAGE)
    assert account.ready_bytes == 3 * PAGE == COUNT * PAGE - driver.memory().free_bytes
    pool.check()
    account.check()
    wait_until(view, lambda: shown(runtime).maps >= 9)
    (times, maps) = shown(runtime).map_seconds, shown(runtime).maps
    assert times.total == maps and 0 < times.sum_seconds < 10, "every map is timed"

    pool.close()
    assert account.leased_bytes == account.ready_bytes == 0
    account.check()
    view.close()
    account.detach()
