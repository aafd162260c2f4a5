"""Sleep mode on several ranks: equal counts afterwards, failure of one rank, and vLLM's own check."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker import gpu_worker

from kvcached_core.errors import CapacityError, DriverError, InvariantError, KVCachedError
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount
from tests.fakes import FakeDriver
from tests.faults import FaultyDriver
from tests.small_pool import COUNT, PAGE, ready
from vllm_kvcached.sleeping import GREW, TAGS, RankSleep, others_may_grow

GRANULE = 2 * PAGE


class FakeStart:
    """Records a rank's calls to the ledger, in order."""

    def __init__(self) -> None:
        self.private = SimpleNamespace(absent_bytes=0)
        self.told: list[tuple[str, int]] = []
        self.refusal: KVCachedError | None = None

    def note_asleep(self) -> None:
        self.told.append(("asleep", self.private.absent_bytes))

    def note_awake(self) -> None:
        self.told.append(("awake", self.private.absent_bytes))

    def wait_to_wake(self, memory: Any) -> None:
        self.told.append(("waits", self.private.absent_bytes))
        if self.refusal is not None:
            raise self.refusal


class Ranks:
    """Ranks that hold these numbers of granules, each on its own thread, and their results."""

    def __init__(self, *held: int, broken: int | None = None) -> None:
        self._barrier, self._said = threading.Barrier(len(held)), [None] * len(held)
        self.accounts = [FakeAccount(GRANULE, COUNT * GRANULE) for _ in held]
        self.drivers = [FaultyDriver(FakeDriver(COUNT * GRANULE)) for _ in held]
        if broken is not None:
            self.drivers[broken] = FaultyDriver(
                FakeDriver(COUNT * GRANULE), "release", 1, forever=True,
                error=lambda: DriverError("release", 1, "broken"),
            )  # fmt: skip
        self.pools: list[ElasticPool] = [ready(*pair) for pair in zip(self.accounts, self.drivers, held,
                                                                      strict=True)]  # fmt: skip
        self.starts: list[Any] = [FakeStart() for _ in held]
        self.sleeps = [self._rank(rank) for rank in range(len(held))]
        self.errors: list[Exception | None] = [None] * len(held)

    def _rank(self, rank: int) -> RankSleep:
        def gather(mine: Any) -> list[Any]:
            self._said[rank] = mine
            self._barrier.wait(20)
            said = list(self._said)
            self._barrier.wait(20)
            return said

        return RankSleep(self.pools[rank], self.drivers[rank].driver, self.starts[rank], gather, lambda: 7)

    def all(self, do: Callable[[RankSleep], None]) -> None:
        def one(rank: int) -> None:
            try:
                do(self.sleeps[rank])
            except Exception as error:
                self.errors[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.sleeps))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    def close(self) -> None:
        for driver, pool in zip(self.drivers, self.pools, strict=True):
            driver.heal()
            pool.close()


def fall(sleep: RankSleep) -> None:
    with sleep.falling_asleep(TAGS):
        pass


def wake(sleep: RankSleep) -> None:
    with sleep.waking_up(None):
        pass


def test_ranks_that_held_different_amounts_report_the_same_count_once_asleep() -> None:
    ranks = Ranks(9, 12, 7)
    for expected in (13, 14):
        ranks.all(fall)
        assert ranks.errors == [None] * 3
        counts = {(one.created_granules, one.released_granules) for one in ranks.accounts}
        assert counts == {(expected, expected - 1)}, "more than any scheduler has ordered"
        assert [one.ready_bytes for one in ranks.accounts] == [GRANULE] * 3
    ranks.all(wake)
    for account, pool in zip(ranks.accounts, ranks.pools, strict=True):
        account.want(3)
        pool.sleep.take_turn()
        pool.apply(Plan(0, (), (1, 2), 13))
        pool.check()
    ranks.close()


def test_if_one_rank_fails_to_sleep_all_ranks_fail_and_none_uses_freed_memory() -> None:
    ranks = Ranks(5, 5, broken=1)
    ranks.all(fall)
    assert all(isinstance(error, KVCachedError) for error in ranks.errors)
    assert "granules are still there" in str(ranks.errors[0]), "the reason, on every rank"
    for pool in ranks.pools:
        pool.sleep.end()
        with pytest.raises(InvariantError, match="has ended"):
            pool.apply(Plan(0, (), (1,), 0))
    ranks.close()


def test_memory_is_offered_after_vllm_frees_it_and_claimed_before_vllm_restores_it() -> None:
    ranks = Ranks(4)
    (sleep,), (start,) = ranks.sleeps, ranks.starts
    with sleep.falling_asleep(TAGS):
        assert start.told == [] and ranks.accounts[0].ready_bytes == GRANULE, "the KV cache went before"
    assert start.told == [("asleep", 7)]
    start.refusal = CapacityError("no room")
    with pytest.raises(CapacityError), sleep.waking_up(["weights"]):
        pytest.fail("vLLM must not restore what was not promised")
    start.refusal = None
    with sleep.waking_up(["weights"]):
        assert start.told[-1] == ("waits", 7)
    assert start.told[-1] == ("awake", 7) and ranks.pools[0]._handles.asleep, "the KV cache sleeps on"
    with sleep.waking_up(["kv_cache"]):
        pass
    assert not ranks.pools[0]._handles.asleep
    ranks.close()


def test_growth_of_other_processes_during_falling_asleep_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """vLLM asserts that free memory on the device has grown, whichever process took memory."""
    assert f'assert freed_bytes >= 0, "{GREW}"' in inspect.getsource(gpu_worker.Worker.sleep)
    with caplog.at_level("INFO"), others_may_grow():
        raise AssertionError(GREW)
    assert "took more memory than this engine freed" in caplog.text
    with pytest.raises(AssertionError, match="another"), others_may_grow():
        raise AssertionError("another")
