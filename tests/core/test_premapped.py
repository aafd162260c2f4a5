"""Granules mapped ahead of need: zero before use, no handle lost."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_core.driver.host import HostDriver
from kvcached_core.errors import InvariantError
from kvcached_core.geometry import make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker import background_mapping
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.pool import ElasticPool
from kvcached_core.worker.premapped import Premapped
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver
from tests.small_pool import PAGE, ROW, offsets, ready


def test_i6_a_claim_follows_an_unfinished_zeroing(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ready(account, driver, 1 + 3 * ROW)
    pool.background.premap()
    first, second, third = (1 + row * ROW for row in range(3))
    driver.complete_own(2)  # the first row: one call in each segment
    pool.apply(Plan(0, (), (first,), 0), stream=7)
    assert driver.follows == 0, "its zeroing was seen to be complete"
    pool.apply(Plan(1, (), (second,), 0), stream=7)
    assert driver.follows == 1
    driver.launch(offsets(0, first, second), stream=7)
    driver.launch(offsets(0, first), stream=8)
    with pytest.raises(InvariantError, match="zeroed"):
        driver.launch(offsets(second), stream=8)
    with pytest.raises(InvariantError, match="zeroed"):
        driver.launch(offsets(third), stream=7)
    assert driver.own.completed == 2, "and no thread has waited"


def test_a_claimed_granule_costs_no_driver_map_in_apply(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver)
    pool = ready(account, faulty, 1 + 2 * ROW)
    pool.background.premap()
    driver.complete_own(2)  # the first row
    before = Counter(faulty.calls)
    pool.apply(Plan(0, (), (ROW - 1, ROW, ROW + 1), 0))
    assert faulty.calls - before == {"passed": 1, "follow": 1}, "for all rows together"
    assert pool.stats()[:3] == (4, 0, 2 * ROW - 3)


def test_granules_in_a_row_are_one_call_in_each_segment(account: FakeAccount) -> None:
    """Each call releases Python's lock, and its thread and the engine's loop then compete for it."""
    driver = FakeDriver(1 << 20, patience=0)
    faulty = FaultyDriver(driver)
    pool = ready(account, faulty, 1 + 4 * ROW)
    before = Counter(faulty.calls)
    assert pool.background.premap() is False and pool.stats().premapped == 4 * ROW
    assert faulty.calls - before == {"map": 4 * 2, "record": 4, "own_stream": 8}
    ahead, rest = tuple(range(1, 1 + 4 * ROW)), (*range(40, 40 + ROW), 60)
    pool.apply(Plan(0, (), ahead, 0))
    account.want(1 + 5 * ROW + 1)
    while pool._growth.grow(0.0, True) == 0.0:
        pass
    before = Counter(faulty.calls)
    pool.apply(Plan(1, (), rest, 0))
    assert (faulty.calls - before)["map"] == 2 * 2, "a row, and one beyond"
    driver.launch(offsets(*ahead, *rest))
    pool.apply(Plan(2, (*ahead[1:], *rest), (), 0))
    before = Counter(faulty.calls)
    assert pool.background.unmap_deferred() == 0
    assert (faulty.calls - before)["unmap"] == 2 * (4 + 2), "15 in rows of 4, then the last plan's two"
    pool.check()


def test_i5_a_wrong_guess_gives_its_handles_back(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20, patience=2)
    pool = ready(account, driver, 4)
    pool.background.premap()
    creates = driver.creates
    pool.apply(Plan(0, (), (9, 50, 30), 0))
    assert driver.creates == creates
    assert pool.stats()[:4] == (4, 0, 0, 0)
    driver.launch(offsets(0, 9, 30, 50))
    pool.apply(Plan(1, (50, 9), (), 0))
    driver.complete(driver.launched)
    assert pool.background.unmap_deferred() == 0
    pool.background.premap()
    assert pool._premapped.granules() == {1, 2}, "the lowest, not the granules that were unmapped"
    pool.check()


def test_a_right_guess_is_not_given_up_for_a_wrong_one_of_the_same_plan(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    faulty = FaultyDriver(driver)
    pool = ready(account, faulty, 3)
    pool.background.premap()
    driver.complete_own(driver.own.launched)
    before = Counter(faulty.calls)
    pool.apply(Plan(0, (), (9, 2), 0))
    moved = faulty.calls - before
    assert (moved["unmap"], moved["map"]) == (2, 2), "granule 1 went to 9; 2 is where it was"


def test_i5_a_step_waits_for_zeroing_if_all_handles_are_ahead(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20, patience=6)
    pool = ready(account, driver, 3)
    pool.background.premap()
    pool.apply(Plan(0, (), (8, 9), 0))
    assert pool.stats()[:4] == (3, 0, 0, 0)
    with pytest.raises(InvariantError, match="I5"):
        pool.apply(Plan(1, (), (10,), 0))


def test_nothing_is_mapped_ahead_while_a_step_waits_for_handles(account: FakeAccount) -> None:
    """Otherwise the thread could use up the handle that the step waits for."""
    driver = FakeDriver(1 << 20, patience=6)
    pool = ready(account, driver, 3)
    pool.background.premap()
    waits, wait = [], pool._lock.changed.wait

    def watched(timeout: float | None = None) -> bool:
        waits.append(pool._lock.step_first.locked())
        return wait(timeout)

    pool._lock.changed.wait = watched  # type: ignore[method-assign]
    pool.apply(Plan(0, (), (8,), 0))
    assert waits and all(waits)
    assert not pool._lock.step_first.locked()


def test_owed_granules_are_withdrawn_the_highest_first_and_only_when_zeroed(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ready(account, driver, 5)
    assert pool.supply_thread.turn(0.0) is None
    assert pool.stats().premapped == 4
    account.want(2)
    pool.apply(Plan(0, (), (), 3))
    assert pool.supply_thread.turn(0.0, rung=False) == 0.001, "another turn is needed"
    assert pool.stats().premapped == 4
    driver.complete_own(driver.own.launched)
    assert pool.supply_thread.turn(0.001, rung=False) is None
    assert pool._premapped.granules() == {1}
    assert (driver.held_bytes(), account.ready_bytes, account.released_granules) == (4 * PAGE, 4 * PAGE, 3)


def test_no_more_is_mapped_ahead_than_a_step_maps_until_the_step_has_taken_it(
    account: FakeAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_mapping, "MAX_PREMAPPED_GRANULES", 2)
    pool = ready(account, FakeDriver(1 << 20), 6)
    assert not pool.background.premap()
    assert pool._premapped.granules() == {1, 2} and len(pool._handles.spare) == 3
    pool.apply(Plan(0, (), (1, 2), 0))
    assert os.eventfd_read(pool.supply_thread._wake) > 0, "the thread is to map the next ones"
    pool.supply_thread.turn(0.0, rung=False)
    assert pool._premapped.granules() == {3, 4}
    pool.check()


def test_what_is_owed_is_freed_and_not_mapped_before(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ready(account, driver, 5)
    account.want(2)
    pool.apply(Plan(0, (), (), 3))
    assert not pool.background.premap()
    assert pool.stats()[:4] == (1, 0, 0, 4)
    pool._handles.release_owed()
    pool._handles.report()
    pool.background.premap()
    assert pool.stats()[:4] == (1, 0, 1, 0)


def test_warm_up_takes_back_what_is_ahead_and_nothing_comes_ahead_in_it(account: FakeAccount) -> None:
    driver = FakeDriver(1 << 20)
    pool = ready(account, driver, 3)
    pool.background.premap()
    pool.begin_warm_up()
    assert pool.stats()[2:4] == (0, 2)
    driver.launch()
    account.want(5)
    assert pool.supply_thread.turn(0.0) is None, "and the thread lives"
    assert pool.stats()[2:4] == (0, 4)
    pool.end_warm_up()
    pool.supply_thread.turn(0.0)
    assert pool.stats()[2:4] == (4, 0)
    pool.apply(Plan(0, (), (1,), 0), stream=3)
    driver.launch(offsets(0, 1), stream=3)


def test_ahead_granules_of_real_memory_read_zero_also_after_reuse() -> None:
    page, count = 16384, 8
    geometry = make_geometry(page, page, (0,), count, 4096)
    driver, account = HostDriver(count * page), FakeAccount(page, count * page)
    pool = ElasticPool(driver, geometry, account)
    account.want(6)
    for turn in range(4):
        pool.supply_thread.turn(float(turn))
        assert pool._premapped.granules() == {1, 2, 3, 4, 5}
        maps = pool.mapping_stats().maps
        pool.apply(Plan(2 * turn, (), (1, 2, 3, 4, 5), 0))
        assert pool.mapping_stats().maps == maps
        view = pool.tensor[page : 6 * page]
        assert int(view.count_nonzero()) == 0
        view.fill_(7)
        pool.apply(Plan(2 * turn + 1, (1, 2, 3, 4, 5), (), 0))
    pool.close()
    account.close()


MOVE = st.sampled_from(["place", "map", "unmap", "withdraw", "claim"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(MOVE, st.integers(0, 11))))
def test_the_guess_is_the_lowest_vacant_granule(moves: list[tuple[str, int]]) -> None:
    """True whichever granules other code maps; the list of unmapped granules stays bounded."""
    driver = FakeDriver(1 << 20, patience=0)
    arena = Arenas(driver, PAGE, 1)
    arena.add(make_geometry(PAGE, PAGE, (0,), 12, 64), 12 * PAGE)
    premapped = Premapped(driver, arena, 1, 12)
    spare: list[Handles] = [(driver.create(PAGE),) for _ in range(12)]
    arena.map(0, [spare.pop()], 0)
    ordinary: set[int] = set()
    for move, granule in moves:
        lowest = premapped.lowest_vacant()
        assert lowest == min(set(range(12)) - arena.mapped.keys(), default=None)
        if move == "place" and lowest is not None:
            row = premapped.vacant_row(min(granule % 4, len(spare)))
            assert list(row) == [g for g in range(lowest, lowest + len(row)) if g not in arena.mapped]
            assert len(row) == min(granule % 4, len(spare)) or row.stop in arena.mapped or row.stop == 12
            if row:
                premapped.map(lowest, [spare.pop() for _ in row])
        elif move == "map" and granule not in arena.mapped:
            arena.map(granule, [spare.pop()], 0)
            ordinary.add(granule)
        elif move == "claim" and premapped.claim([granule], 0):
            ordinary.add(granule)
        elif move == "unmap" and granule in ordinary:
            driver.synchronize()
            spare += arena.unmap(granule)
            ordinary.remove(granule)
            premapped.vacated(granule)
        elif move == "withdraw" and premapped:
            highest, handles = max(premapped.granules()), premapped.withdraw()
            spare += handles
            assert not handles or highest not in premapped
        assert premapped.granules() | ordinary | {0} == arena.mapped.keys()
        assert len(premapped._vacancies._returned) <= 12
