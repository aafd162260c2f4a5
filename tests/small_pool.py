"""A pool of a hundred granules over a fake driver, two pages of one block each."""

from __future__ import annotations

from kvcached_core.geometry import make_geometry
from kvcached_core.worker.pool import ROW_PAGES, ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver

PAGE, COUNT = 128, 100
GEOMETRY = make_geometry(PAGE, PAGE, (0, COUNT * PAGE), COUNT, 64)  # a granule is two pages of one block each


ROW = ROW_PAGES // 2  # granules


def offsets(*granules: int) -> list[int]:
    """Return the offsets of the granules' pages in the reserved range."""
    return [offset for granule in granules for offset in GEOMETRY.ranges(granule)]


def ready(account: FakeAccount, driver: FakeDriver | FaultyDriver, granules: int) -> ElasticPool:
    """Return a pool that holds `granules` granules; all but granule 0 are spare, and none is mapped ahead."""
    pool = ElasticPool(driver, GEOMETRY, account)
    account.want(granules)
    while pool._growth.grow(0.0, True) == 0.0:
        pass
    assert pool.stats().spare == granules - 1
    return pool
