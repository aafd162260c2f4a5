"""The tools that damage a cache on purpose do their damage: the tests' negative controls depend on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devkit import sabotage
from kvcached_core.driver.host import HostDriver
from kvcached_core.geometry import make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount

PAGE, COUNT = 16384, 8
MAPPED = (0, 1, 2, 5)


@pytest.fixture
def pool() -> Iterator[ElasticPool]:
    """A pool with the granules of MAPPED, one page each, all zeros."""
    account = FakeAccount(PAGE, COUNT * PAGE)
    pool = ElasticPool(HostDriver(COUNT * PAGE), make_geometry(PAGE, PAGE, (0,), COUNT, 4096), account)
    account.want(len(MAPPED))
    while pool._growth.grow(0.0, True) == 0.0:
        pass
    pool.apply(Plan(0, (), MAPPED[1:], 0))
    yield pool
    pool.close()
    account.close()


def test_overwrite_changes_every_mapped_granule_except_the_first(pool: ElasticPool) -> None:
    assert sabotage.overwrite(pool) == 3
    sums = [int(pool.tensor[g * PAGE : (g + 1) * PAGE].count_nonzero()) for g in MAPPED]
    assert sums[0] == 0
    assert min(sums[1:]) > PAGE // 2


def test_unmap_leaves_only_the_first_granule(pool: ElasticPool) -> None:
    assert sabotage.unmap(pool) == 3
    assert pool.mapping_stats().unmaps == 3
    assert pool.mapped_bytes() == PAGE
