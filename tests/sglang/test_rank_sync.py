"""Ranks get the same reading at the same calls, however the ledger changes in between."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvcached_core.ledger import EngineUsage
from sglang_kvcached.rank_sync import (
    MAX_BUSY_CALLS,
    MAX_IDLE_CALLS,
    SYNC_SECONDS,
    LedgerReading,
    RankSync,
    SingleRank,
)
from tests.core.governed import FakeLedger

BOUND_SECONDS = 30.0


class Threads:
    """A group whose ranks are threads; each call of `share` needs all of them."""

    is_single = False

    def __init__(self, ranks: int) -> None:
        self._readings: list[queue.Queue[LedgerReading]] = [queue.Queue() for _ in range(ranks)]
        self._of: dict[int, int] = {}

    def join(self, rank: int) -> None:
        """Say which rank this thread is."""
        self._of[threading.get_ident()] = rank

    def share(self, reading: LedgerReading | None) -> LedgerReading:
        """Return rank 0's reading."""
        rank = self._of[threading.get_ident()]
        if rank == 0:
            assert reading is not None
            for each in self._readings[1:]:
                each.put(reading)
            return reading
        assert reading is None
        return self._readings[rank].get(timeout=BOUND_SECONDS)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def together(group: Threads, ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work` on every rank and return the results."""
    results: list[Any] = [None] * ranks
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        group.join(rank)
        try:
            results[rank] = work(rank)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_SECONDS)
    assert not failed, failed
    return results


@pytest.mark.parametrize("seed", range(5))
def test_ranks_get_the_same_reading_at_every_call(seed: int) -> None:
    """Rank 0's clock and ledger change at random; all ranks make the same calls."""
    ranks = 3
    group, ledger, clock = Threads(ranks), FakeLedger(), Clock()
    chance = random.Random(seed)
    calls = [chance.random() < 0.5 for _ in range(400)]

    def work(rank: int) -> list[tuple[bool, LedgerReading]]:
        rank_sync = RankSync(ledger if rank == 0 else None, group, False, clock if rank == 0 else Clock())
        readings = []
        for idle in calls:
            if rank == 0:
                clock.now += chance.expovariate(200.0)
                ledger.limit, ledger.ranks = chance.randrange(1, 12), [chance.randrange(1, 99)]
            readings.append((rank_sync.sync(idle), rank_sync.reading))
        return readings

    first, *others = together(group, ranks, work)
    assert all(other == first for other in others)
    assert len({reading.limit for _, reading in first}) > 3


@pytest.mark.parametrize("step_seconds", [0.0002, 0.02, 0.1])
def test_a_new_limit_is_read_within_half_a_second_of_work(step_seconds: float) -> None:
    """Also if the scheduler was idle before, and so took a reading only once in many calls."""
    group, ledger, clock = Threads(1), FakeLedger(), Clock()
    group.join(0)
    rank_sync = RankSync(ledger, group, False, clock)
    for _ in range(2000):
        clock.now += 1e-5
        rank_sync.sync(idle=True)
    assert rank_sync.reading.calls > 1
    rank_sync.sync(idle=False)
    ledger.limit, begun = 3, clock.now
    while rank_sync.granule_limit() != 3:
        clock.now += step_seconds
        rank_sync.sync(idle=False)
    assert clock.now - begun <= max(0.5, 2 * step_seconds)


def test_a_spinning_loop_takes_a_reading_about_every_ten_milliseconds() -> None:
    group, ledger, clock = Threads(1), FakeLedger(), Clock()
    group.join(0)
    rank_sync = RankSync(ledger, group, False, clock)
    readings = 0
    for _ in range(10_000):
        clock.now += 1e-4
        readings += rank_sync.sync(idle=True)
    assert 0.5 < readings * SYNC_SECONDS / 1.0 < 2
    assert MAX_BUSY_CALLS < SYNC_SECONDS / 1e-4 < MAX_IDLE_CALLS


def test_a_loop_that_sleeps_when_idle_takes_a_reading_each_time() -> None:
    group, ledger, clock = Threads(1), FakeLedger(), Clock()
    group.join(0)
    rank_sync = RankSync(ledger, group, True, clock)
    assert all(rank_sync.sync(idle=True) for _ in range(100))


def test_waiting_ends_with_the_memory_a_refusal_or_the_time_limit() -> None:
    ledger, clock = FakeLedger(ranks=[3, 3]), Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 0.005:
            ledger.ranks = [9, 9]

    rank_sync = RankSync(ledger, SingleRank(), False, clock, sleep)
    rank_sync.wait(9, 0.02)
    assert rank_sync.created() == 9 and 0.005 < clock.now < 0.007
    rank_sync.sync(idle=False)
    rank_sync.wait(12, 0.02)
    assert rank_sync.created() == 9 and 0.025 < clock.now < 0.028
    ledger.is_refused = True
    rank_sync.sync(idle=False)
    begun = clock.now
    rank_sync.wait(12, 0.02)
    assert rank_sync.refused() and clock.now == begun


def sync_that_grows_in_each_pause() -> tuple[RankSync, FakeLedger, Clock]:
    """Return a sync over a ledger of two ranks with 3 granules that create one more in each pause."""
    ledger, clock = FakeLedger(ranks=[3, 3]), Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds
        ledger.ranks = [count + 1 for count in ledger.ranks]

    return RankSync(ledger, SingleRank(), False, clock, sleep), ledger, clock


def test_waiting_goes_on_while_more_memory_is_coming_within_the_time_limit() -> None:
    rank_sync, ledger, clock = sync_that_grows_in_each_pause()
    rank_sync.wait(5, 0.02, lambda: ledger.created() < 11)
    assert rank_sync.created() == 11 and clock.now == pytest.approx(0.004)
    rank_sync.wait(11, 0.02, lambda: True)
    assert clock.now == pytest.approx(0.02, abs=0.001)
    ledger.is_refused, begun = True, clock.now
    rank_sync.sync(idle=False)
    rank_sync.wait(11, 0.02, lambda: True)
    assert clock.now == begun


def test_all_waits_of_a_step_share_its_time() -> None:
    rank_sync, ledger, clock = sync_that_grows_in_each_pause()
    rank_sync.wait(13, 0.02)
    assert rank_sync.created() == 13 and clock.now == pytest.approx(0.005)
    rank_sync.wait(1000, 0.02)
    begun = clock.now
    assert begun == pytest.approx(0.02, abs=0.001) and rank_sync.created() < 1000
    ledger.ranks = [500, 500]
    rank_sync.wait(1000, 0.02)
    assert clock.now == begun and rank_sync.created() == 500, "memory that came in the meantime is read"
    rank_sync.sync(idle=False)
    rank_sync.wait(1000, 0.02)
    assert clock.now == pytest.approx(begun + 0.02, abs=0.001)


def test_only_rank_0_writes_into_the_ledger() -> None:
    group, ledger = Threads(2), FakeLedger()
    usage = EngineUsage(1, 0, 0, 1, 1, 1, 0, 1)

    def work(rank: int) -> None:
        rank_sync = RankSync(ledger if rank == 0 else None, group, False, Clock())
        rank_sync.publish(usage)

    together(group, 2, work)
    assert ledger.told == [usage]
