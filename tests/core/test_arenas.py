"""A pool of two arenas: one supply of pages, one numbering of granules, one size of granule in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from kvcached_core.errors import CapacityError, InvariantError
from kvcached_core.geometry import Geometry, make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver

PAGE = 64


def arena(segments: int, granules: int, page: int = PAGE) -> Geometry:
    """Return an arena whose granules are a page in every segment."""
    starts = [at * granules * page for at in range(segments)]
    return make_geometry(page, page, starts, granules, 64)


WIDE, NARROW = arena(4, 6), arena(2, 10)  # granules 0 to 5 are four ledger granules each, 6 to 15 two


def pool_of(driver: FakeDriver, account: FakeAccount, held: int = 6) -> ElasticPool:
    """Return a pool of both arenas that holds this many ledger granules."""
    pool = ElasticPool(driver, WIDE, account, pages_per_ledger_granule=1)
    pool.add(NARROW)
    account.want(held)
    while pool._growth.grow(0.0, True) == 0.0:
        pass
    return pool


def fakes(capacity_pages: int = 100) -> tuple[FakeDriver, FakeAccount]:
    """Return a device and an account that counts in pages."""
    driver = FakeDriver(capacity_pages * PAGE, patience=0)
    return driver, FakeAccount(PAGE, 1 << 20)


def test_i7_the_first_granule_of_either_has_memory_and_keeps_it() -> None:
    driver, account = fakes()
    pool = pool_of(driver, account)
    assert pool.stats().mapped == pool.stats().created == 4 + 2
    for first in (0, 6):
        with pytest.raises(InvariantError, match="not legal"):
            pool.apply(Plan(0, (first,), (), 0))
    pool.check()
    pool.close()
    assert account.leased_bytes == 0


def test_i5_granules_of_both_take_from_one_supply() -> None:
    driver, account = fakes()
    pool = pool_of(driver, account, held=6 + 8)
    pool.apply(Plan(0, (), (1, 7, 15), 0))
    assert pool.stats().mapped == 14 and pool.mapped_bytes() == 14 * PAGE
    with pytest.raises(InvariantError, match="I5"):
        pool.apply(Plan(1, (), (2,), 0))
    pool.check()
    assert pool.stats().mapped == 14
    pool.close()


def test_a_large_granule_is_mapped_from_small_ones_that_go() -> None:
    driver, account = fakes()
    pool = pool_of(driver, account, held=6 + 4)
    pool.apply(Plan(0, (), (8, 9), 0))
    pool.apply(Plan(1, (8, 9), (5,), 0))
    assert pool.stats().mapped == 10 and pool.stats().deferred == 0
    pool.check()
    pool.apply(Plan(2, (5,), (10,), 0))
    assert (pool.stats().mapped, pool.stats().spare) == (8, 2)
    pool.check()
    pool.close()


def test_nothing_is_mapped_ahead_where_a_granule_was_given_back() -> None:
    driver, account = fakes()
    pool = pool_of(driver, account, held=6 + 4)
    pool.apply(Plan(0, (), (1,), 0))
    pool.supply_thread.turn(0.0)
    pool.apply(Plan(1, (1,), (), 0))
    pool.supply_thread.turn(0.0)
    pool.supply_thread.turn(0.0)
    assert (pool.stats().premapped, pool.stats().spare) == (0, 4)
    pool.check()
    pool.close()


def test_i2_what_is_let_go_is_freed_unit_by_unit() -> None:
    driver, account = fakes()
    pool = pool_of(driver, account, held=6 + 4)
    pool.apply(Plan(0, (), (1,), 0))
    account.want(7)
    pool.apply(Plan(1, (1,), (), 3))
    pool.supply_thread.turn(0.0)
    assert (pool.stats().released, pool.stats().spare, account.leased_bytes) == (3, 1, 7 * PAGE)
    pool.check()
    pool.close()


@pytest.mark.parametrize("capacity", range(6))
def test_i8_an_arena_that_cannot_have_its_first_granule_leaves_nothing(capacity: int) -> None:
    driver, account = fakes(capacity)
    make: Callable[[], object] = partial(ElasticPool, driver, WIDE, account, pages_per_ledger_granule=1)
    if capacity >= 4:
        pool = ElasticPool(driver, WIDE, account, pages_per_ledger_granule=1)
        make = partial(pool.add, NARROW)
    with pytest.raises(CapacityError):
        make()
    kept = 4 if capacity >= 4 else 0
    assert account.leased_bytes == account.ready_bytes == kept * PAGE
    assert len(driver.table.mappings) == len(driver.table.sizes) == kept
    assert len(driver.table.ranges) == (1 if kept else 0)


def test_arenas_with_other_pages_are_refused() -> None:
    driver, account = fakes()
    pool = pool_of(driver, account)
    with pytest.raises(InvariantError, match="are not whole ledger granules of 1 pages of 64 bytes"):
        pool.add(arena(2, 4, page=128))
    with pytest.raises(InvariantError, match="there is no granule 16"):
        pool._arenas.ledger_granules(16)
    pool.close()
