"""The budget: giving memory to other engines, waiting for memory, and admitting again after a refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.driver.base import Handle
from kvcached_core.ledger import snapshot
from kvcached_core.scheduler.floor_grace import FLOOR_GRACE_SECONDS
from tests.sglang.elastic import Engine, engine, request
from tests.sglang.twins import KINDS, Twins

KIND = KINDS["mha-16"]


def ask(made: Engine, field: str, granules: int) -> None:
    """Ask the engine to shrink to this many granules, as another engine on the device does."""
    account = made.context.account
    with account._membership.exclusive() as file:
        file.set(account.slot, field, granules * account.granule_bytes)
        file.set(account.slot, "asked_until_ms", int((made.now + 60) * 1000))


def started(made: Engine, requests: int = 4, tokens: int = 272) -> Twins:
    """Return an engine with requests of 17 pages; a granule has 8."""
    twins = Twins(made, KIND)
    for _ in range(requests):
        twins.begin(tokens)
    assert len(twins.requests) == requests
    return twins


def test_above_a_target_no_request_begins_and_none_is_retracted(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 3)
        before = made.mapped
        ask(made, "target_bytes", 2)
        for _ in range(20):
            made.now += FLOOR_GRACE_SECONDS
            ask(made, "target_bytes", 2)  # its own leases withdraw the target, as no other engine is there
            twins.decode()
        ask(made, "target_bytes", 2)
        twins.begin(16)
        assert len(twins.requests) == 3 and made.mapped >= before
        before = made.held()
        twins.end(0, keep=True)
        ask(made, "target_bytes", 2)
        twins.decode()
        made.turn()
        assert made.held() < before and not made.cache.lent
        assert len(twins.requests) == 2


def test_above_a_target_a_request_begins_if_none_runs(tmp_path: Path) -> None:
    """Otherwise it would wait forever: no request runs that could end."""
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 0)
        ask(made, "target_bytes", 1)
        twins.begin(60)
        assert len(twins.requests) == 1


def test_requests_are_retracted_for_another_engines_floor_after_the_grace(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 4)
        ask(made, "must_bytes", 5)
        twins.decode()
        assert len(twins.requests) == 4
        ask(made, "must_bytes", 5)
        twins.decode()
        assert len(twins.requests) == 4
        made.now += FLOOR_GRACE_SECONDS + 0.01
        twins.decode()
        made.turn()
        assert made.held() <= 5 and len(twins.requests) == 1
        assert made.memory.counters.retractions == 3


def test_batch_is_full_is_cleared_once_a_refused_request_fits(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 2)
        made.limit(6)
        twins.begin(272)
        assert len(twins.requests) == 2
        batch = made.scheduler.running_batch
        batch.batch_is_full = True  # SGLang sets it after NO_TOKEN
        twins.decode()
        assert batch.batch_is_full
        made.limit(12)
        twins.decode()
        assert not batch.batch_is_full
        twins.begin(272)
        assert len(twins.requests) == 3


def test_batch_is_full_is_cleared_on_a_batch_that_replaces_the_running_one(
    tmp_path: Path,
) -> None:
    """SGLang sets batch_is_full on a batch that becomes the running one only after check_decode_capacity."""
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 2)
        made.limit(6)
        twins.begin(272)
        made.limit(12)
        twins.decode()  # clears it on the batch that is replaced
        before = made.scheduler.running_batch
        made.scheduler.running_batch = SimpleNamespace(reqs=before.reqs, batch_is_full=True)
        twins.decode()
        assert not made.scheduler.running_batch.batch_is_full
        twins.begin(272)  # admitted: no request is refused any more, so SGLang's own flag is left alone
        made.scheduler.running_batch.batch_is_full = True
        twins.decode()
        assert made.scheduler.running_batch.batch_is_full


def test_a_prompt_above_the_limit_is_refused_and_a_long_answer_is_cut(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 0)
        made.limit(2)
        made.idle()
        most: Any = twins.elastic.max_new_tokens_for_memory
        limits = {"token_capacity": 1500, "sliding_window_size": None, "chunk_size": None}
        assert most(250, 10, **limits) is None
        assert most(100, 500, **limits) == 2 * 128 - 16 - 112 - 16 - 1
        made.limit(64)
        made.idle()
        assert most(250, 10, **limits) == 10


def test_a_step_waits_for_memory_that_is_on_its_way(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 0)
        begun = made.now
        twins.begin(300)
        assert len(twins.requests) == 1 and 0 < made.now - begun <= made.context.settings.grant_seconds


def test_a_step_waits_for_its_own_memory_and_not_for_the_next_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 1)
        _one_granule_a_pause(made, monkeypatch)
        made.scheduler.waiting_queue = [request(prompt=256)] * 8
        twins.begin(300)
        governor = made.memory.governor
        assert len(twins.requests) == 2
        assert governor.held == made.mapped < governor.enough, "the rest comes while the step runs"


def test_the_first_step_of_a_burst_waits_once_for_all_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 0)
        _one_granule_a_pause(made, monkeypatch)
        made.scheduler.waiting_queue = [request(prompt=128)] * 8
        memory = made.memory
        twins.elastic.create_prefill_budget(made.cache)
        assert memory.governor.held < memory.governor.enough == 3, "18 pages: 7, 8 and 3"
        memory.wait_for_pages([9])
        assert memory.governor.held >= memory.governor.enough


def _one_granule_a_pause(made: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the supply thread make one granule in each turn, and take one turn in each pause."""
    thread = made.rank_memory.pool.supply_thread

    def turn() -> None:
        thread.is_at_work = thread.turn(made.now) == 0.0

    monkeypatch.setattr("kvcached_core.worker.handle_growth.SLICE_GRANULES", 1)
    monkeypatch.setattr(made, "turn", turn)


def test_i5_a_limit_lowered_while_requests_are_admitted_does_not_affect_them(tmp_path: Path) -> None:
    """Requests are admitted one by one and take their pages later together; these must still be there."""
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 0)
        budget = twins.elastic.create_prefill_budget(made.cache)
        admitted = 0
        for turn in range(4):
            if turn:
                made.limit(1)
            fits, _ = budget.check_prefill(
                extend_input_len=160, total_tokens=176, input_tokens=160, chunk_limit=None, max_new_tokens=1,
                swa_host_hit_length=0,
            )  # fmt: skip
            if fits:
                budget.reserve(160, 0)
                admitted += 1
        assert admitted >= 1
        twins.elastic.evict_to_free_tokens(made.cache, admitted * 176)
        assert twins.elastic.alloc(admitted * 160) is not None
        twins.elastic.create_prefill_budget(made.cache)
        assert made.memory.must_retract


def test_a_step_does_not_wait_after_the_ledger_refused(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 1)
        made.context.driver._capacity_bytes = made.rank_memory.held_bytes  # other engines have taken the rest
        twins.begin(300)
        made.turn()
        begun = made.now
        twins.begin(300)
        assert len(twins.requests) == 1 and made.now == begun


@pytest.mark.parametrize(
    ("running", "spin", "pauses"), [(0, "settle_idle", 1), (0, "settle", 1), (1, "settle", 0)]
)
def test_a_scheduler_without_running_requests_pauses_for_the_supply_thread(
    running: int, spin: str, pauses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spinning loop would keep Python's lock from that thread after each call of the driver."""
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 2)
        paused = list[float]()
        monkeypatch.setattr(made.memory._rank_sync, "_sleep", paused.append)
        made.idle()
        assert paused == [], "the supply thread has nothing to do"
        for _ in range(2):
            twins.end(0, keep=False)
        release, spins = made.context.driver.release, list[int]()

        def release_while_it_spins(handle: Handle) -> None:
            made.scheduler.running_batch.reqs = [request()] * running
            getattr(made.memory, spin)()
            made.scheduler.running_batch.reqs = []
            spins.append(len(paused))
            release(handle)

        with monkeypatch.context() as patch:
            patch.setattr(made.context.driver, "release", release_while_it_spins)
            made.idle(10.0)
            made.idle(10.0)
        assert spins == [pauses * (1 + before) for before in range(len(spins))] != []
        assert all(0 < seconds < 0.001 for seconds in paused)


def test_i9_usage_in_the_ledger_counts_used_and_cached_pages(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 3)
        twins.end(0, keep=True)
        twins.decode()
        twins.decode()  # reports the pages that the first step took
        page_bytes = 16 * 128 * 4
        (device,) = snapshot(made.context.runtime)
        (owner,) = device.owners
        used, cached = (1 + 2 * 18) * page_bytes, 17 * page_bytes
        assert (owner.used_bytes, owner.cached_bytes) == (used, cached)


def test_memory_that_only_the_prefix_cache_keeps_is_not_needed(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 4)
        made.memory.settle()
        busy = made.memory.governor.needed
        assert busy >= 4 * 17 // 8
        for _ in range(4):
            twins.end(0, keep=True)
        made.idle(10.0)
        assert made.held() > busy // 2, "the cache is kept"
        (device,) = snapshot(made.context.runtime)
        (owner,) = device.owners
        assert owner.cached_bytes > owner.used_bytes
        assert owner.needed_bytes <= 2 * owner.granule_bytes, "other engines may have it"
