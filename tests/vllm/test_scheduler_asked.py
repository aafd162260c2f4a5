"""The elastic scheduler while other engines ask for its memory: admission, preemption and reports."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from kvcached_core import events
from kvcached_core.ledger.file.doorbells import ring
from kvcached_core.scheduler.floor_grace import FLOOR_GRACE_SECONDS
from tests.vllm.elastic import COUNT, GRANULE, SIZE, Engine, running
from tests.vllm.engines import BLOCK_TOKENS, request, vllm_config

BOUND_SECONDS = 10.0  # for actions that take milliseconds


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of every engine in this file."""
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(config: Any, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine. An indirect parameter sets its limit."""
    with running(config, getattr(request, "param", COUNT)) as made:
        yield made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engine's slot, as tools read it from the ledger."""
    heard: list[Any] = []
    monkeypatch.setattr(events.OBSERVERS, "present", lambda: True)
    monkeypatch.setattr(events.OBSERVERS, "tell", heard.append)
    return heard


def run_some(engine: Engine, requests: list[Any], steps: int) -> None:
    """Add these requests and run some steps."""
    for each in requests:
        engine.scheduler.add_request(each)
    for _ in range(steps):
        engine.step()


def names(requests: list[Any]) -> list[str]:
    """Return the names of requests."""
    return [each.request_id for each in requests]


def test_above_the_target_requests_go_on_and_none_is_admitted(engine: Engine) -> None:
    run_some(engine, [request(60, 40) for _ in range(3)], 8)
    going = names(engine.scheduler.running)
    assert len(going) == 3
    engine.ask(target=2)
    late = request(20, 4)
    engine.scheduler.add_request(late)
    held = engine.worker.held
    engine.slept.clear()
    for _ in range(10):
        output = engine.step(grant=False)
        assert list(output.num_scheduled_tokens) == going, "each of them in every step, and nobody else"
    assert engine.slept == [] and engine.scheduler._kv_demand.preemptions == 0
    room = engine.memory.granules.used_blocks + len(going)
    assert engine.worker.held == max(engine.memory.granules.busy, -(-room // SIZE)) < held
    assert engine.scheduler.pause_state is PauseState.UNPAUSED
    engine.ask()
    engine.run()
    assert engine.answers[late.request_id] == 4 and engine.failed == []


def test_the_target_is_met_as_requests_end_and_the_rest_of_the_memory_is_used(engine: Engine) -> None:
    run_some(engine, [request(60, 20) for _ in range(3)], 8)
    engine.ask(target=3)
    late = [request(20, 4) for _ in range(3)]
    for each in late:
        engine.scheduler.add_request(each)
    for _ in range(60):
        engine.step(grant=False)
        if not engine.memory.over_target:
            assert engine.worker.held <= 3
    assert engine.answers == dict.fromkeys(engine.answers, 20) | dict.fromkeys(names(late), 4)
    assert engine.scheduler._kv_demand.preemptions == 0


def test_a_request_is_admitted_above_the_target_if_no_request_runs(engine: Engine) -> None:
    # Blocks in use without a running request, like those of a session that waits for input.
    run_some(engine, [request(10, 2)], 3)
    pool = engine.scheduler.kv_cache_manager.block_pool
    session = [block for _ in range(6) for block in (engine.step(), pool.get_new_blocks(1))[1]]
    engine.ask(target=1)
    lone = request(BLOCK_TOKENS, 2)
    engine.scheduler.add_request(lone)
    engine.step(grant=False)
    assert engine.memory.over_target and names(engine.scheduler.running) == [lone.request_id]
    engine.run()
    assert engine.answers[lone.request_id] == 2
    pool.free_blocks(session)
    engine.step()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_for_a_floor_the_lowest_priority_and_then_the_latest_is_preempted_after_the_grace(
    tmp_path_factory: pytest.TempPathFactory, policy: str, told: list[Any]
) -> None:
    with running(vllm_config(tmp_path_factory.mktemp("model"), scheduling_policy=policy)) as engine:
        requests = [request(60, 60) for _ in range(4)]
        requests[1].priority = 5
        run_some(engine, requests, 8)
        order = [1, 3, 2, 0] if policy == "priority" else [3, 2, 1, 0]
        engine.ask(target=5, must=5)
        engine.step(grant=False)
        engine.now += FLOOR_GRACE_SECONDS - 0.001
        engine.step(grant=False)
        assert len(engine.scheduler.running) == 4, "they are given the time to end"
        engine.now += 0.002
        output = engine.step(grant=False)
        gone = [at for at in order if requests[at].status == RequestStatus.PREEMPTED]
        assert gone == order[: len(gone)] and 0 < len(gone) < 3
        assert output.preempted_req_ids == {requests[at].request_id for at in gone}
        assert set(output.num_scheduled_tokens) == set(names(engine.scheduler.running))
        assert 5 - 2 <= engine.memory.granules.busy <= engine.worker.held <= 5, "and no more than had to go"
        assert engine.scheduler._kv_demand.preemptions == len(gone)
        said = [event for event in told if event.kind == "preempt"]
        assert [event.data["requests"] for event in said] == [len(gone)]
        assert said[0].data["must_bytes"] == 5 * GRANULE
        engine.ask()
        engine.run()
        assert engine.answers == dict.fromkeys(names(requests), 60) and engine.failed == []


@pytest.mark.parametrize("engine", [8], indirect=True)
def test_the_last_request_is_preempted_for_a_floor_too_and_waits_instead_of_failing(engine: Engine) -> None:
    alone = request(16 * BLOCK_TOKENS, 20)
    run_some(engine, [alone], 8)
    assert engine.scheduler.running == [alone] and alone.num_output_tokens > 0
    engine.ask(target=2, must=2)
    engine.step(grant=False)
    engine.now += FLOOR_GRACE_SECONDS
    output = engine.step(grant=False)
    assert output.total_num_scheduled_tokens == 0 and alone.status == RequestStatus.PREEMPTED
    assert engine.worker.held == 2 and len(engine.worker.mapped) <= 2
    for _ in range(50):
        engine.now += 1.0
        engine.step(grant=False)
    assert engine.failed == [] and engine.scheduler.has_unfinished_requests()
    engine.ask()
    engine.run()
    assert engine.answers == {alone.request_id: 20} and engine.failed == []


def test_a_paused_engine_frees_another_engines_floor(engine: Engine) -> None:
    kept = request(16 * BLOCK_TOKENS, 20)
    run_some(engine, [kept], 8)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    engine.step(grant=False)
    engine.ask(target=2, must=2)
    assert engine.scheduler.has_requests(), "what was spare is given back"
    engine.step(grant=False)
    assert not engine.scheduler.has_requests()
    assert engine.memory._governor.deadline == engine.now + FLOOR_GRACE_SECONDS
    engine.now += FLOOR_GRACE_SECONDS
    assert engine.scheduler.has_requests()
    engine.step(grant=False)
    assert engine.worker.held == 2 and not engine.scheduler.has_requests()
    engine.ask()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert engine.answers == {kept.request_id: 20}


def test_an_idle_engine_gives_memory_back_after_one_ring_and_then_sleeps(
    engine: Engine, told: list[Any]
) -> None:
    run_some(engine, [request(200, 4) for _ in range(3)], 1)
    engine.run()
    engine.step()
    assert not engine.scheduler.has_requests() and engine.memory.granules.cached_blocks > 8 * SIZE
    engine.memory._scheduler_view.drain()  # discard earlier rings
    woken, wakes = threading.Event(), []

    def wake() -> None:
        wakes.append(1)
        woken.set()

    engine.memory.start_idle_waker(wake)
    engine.ask(target=3)
    ring(engine.worker.account._membership.folder.engine_bell(engine.worker.account._slot.index))
    assert woken.wait(BOUND_SECONDS)
    assert engine.scheduler.has_requests()
    engine.step(grant=False)
    assert engine.worker.held == 3 and len(engine.worker.mapped) == 3
    assert not engine.scheduler.has_requests()
    engine.ask(target=1, must=1)
    engine.ask(target=2, must=2)  # before the engine reads the ledger
    assert engine.scheduler.has_requests()
    engine.step(grant=False)
    assert engine.worker.held == 2 and not engine.scheduler.has_requests() and len(wakes) == 1
    evicted = [event.data for event in told if event.kind == "evict"]
    assert sum(data["blocks"] for data in evicted) == engine.memory.queue.evictions > 0


def test_an_idle_engine_does_not_run_for_a_target_that_it_cannot_meet(engine: Engine) -> None:
    engine.step()
    pool = engine.scheduler.kv_cache_manager.block_pool
    run_some(engine, [request(150, 1)], 2)
    blocks = pool.get_new_blocks(8)
    engine.run()
    engine.step()
    engine.ask(target=1, must=1)
    for _ in range(3):
        while engine.scheduler.has_requests():
            engine.step(grant=False)
        engine.now += 5.0
    assert engine.memory.over_target and not engine.scheduler.has_requests()
    pool.free_blocks(blocks)
    assert engine.scheduler.has_requests(), "now it can"


def test_the_idle_since_time_is_published_and_steps_that_only_give_back_do_not_change_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[Any, ...]] = []
    monkeypatch.setattr(engine.memory._activity, "_write", lambda *counts: counted.append(counts))
    engine.scheduler.has_requests()
    assert counted[-1][2] is False and counted[-1][3] > 0
    run_some(engine, [request(100, 2)], 1)
    assert counted[-1][2:] == (True, 0)
    engine.run()
    engine.now += 7.0
    engine.scheduler.has_requests()
    engine.step()
    engine.scheduler.has_requests()
    assert counted[-1][2:] == (False, int(engine.now * 1000))
    ended_at = engine.now
    engine.now += 5.0
    engine.ask(target=2)
    while engine.scheduler.has_requests():
        engine.step(grant=False)
    assert counted[-1][2:] == (False, int(ended_at * 1000)) and engine.worker.held == 2


def test_stock_schedulers_admit_no_request_while_paused_for_new_requests(engine: Engine) -> None:
    # The elastic scheduler relies on this while it is above its target.
    stock = engine.scheduler
    stock.add_request(request(10, 2))
    stock.set_pause_state(PauseState.PAUSED_NEW)
    assert Scheduler.schedule(stock).total_num_scheduled_tokens == 0
    stock.set_pause_state(PauseState.UNPAUSED)
    engine.run()
