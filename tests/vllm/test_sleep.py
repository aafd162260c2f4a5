"""Sleep mode of scheduler and worker together: memory given back, demand while asleep, and waking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from kvcached_core.errors import CapacityError, InvariantError
from kvcached_core.ledger import Runtime, set_floor, set_limit
from tests.vllm.engines import request, vllm_config
from tests.vllm.sleeper import MIB, Sleeper, sleeper
from vllm_kvcached.sleeping import TAGS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of every engine in this file."""
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(config: Any, tmp_path: Path) -> Iterator[Sleeper]:
    """An engine in a ledger of its own, with a limit of 64 MiB."""
    with sleeper(config, tmp_path / "run") as made:
        yield made


def serve(
    engine: Sleeper, count: int = 6, prompt: int = 100, answer: int = 20, beside: Sleeper | None = None
) -> list[Any]:
    """Run this many requests to their end."""
    asked = [request(prompt, answer) for _ in range(count)]
    for one in asked:
        engine.scheduler.add_request(one)
    engine.idle(beside)
    assert [engine.answers[one.request_id] for one in asked] == [answer] * count
    return asked


def check_asleep(engine: Sleeper) -> None:
    """Assert that the engine holds the null granule only, and reports no demand."""
    assert not engine.scheduler.has_requests()
    engine.check()
    engine.pool.sleep.take_turn()
    owner = engine.owner()
    granule = owner.granule_bytes
    assert engine.held_bytes == owner.ready_bytes == owner.leased_bytes == owner.mapped_bytes == granule
    assert (owner.used_bytes, owner.cached_bytes) == (owner.granule_bytes // engine.blocks_per_granule, 0)
    assert owner.needed_bytes <= granule and owner.wanted_bytes == granule and owner.demand_bytes == 0
    assert engine.scheduler.kv_memory._governor.deadline is None, "nobody is woken for nothing"


def test_an_engine_that_sleeps_holds_the_null_granule_and_wants_nothing(engine: Sleeper) -> None:
    serve(engine)
    assert engine.held_bytes > 3 * MIB and engine.owner().cached_bytes > 2 * MIB
    engine.sleep()
    assert engine.held_bytes == engine.owner().granule_bytes, "before the engine runs again"
    check_asleep(engine)
    engine.now += 100
    check_asleep(engine)


def test_an_engine_that_wakes_answers_as_before_from_an_empty_cache(engine: Sleeper) -> None:
    before = serve(engine)
    for turn in range(3):
        engine.sleep()
        check_asleep(engine)
        engine.wake()
        again = [request(one.prompt_token_ids, 20) for one in before]
        for one in again:
            engine.scheduler.add_request(one)
        first = engine.step()
        assert first.num_scheduled_tokens[again[0].request_id] == 64, "no prefix outlived the sleep"
        engine.idle()
        assert [engine.answers[one.request_id] for one in again] == [20] * len(before), turn
    engine.scheduler.kv_memory.queue.check()


def test_asleep_and_awake_again_before_the_scheduler_looks(engine: Sleeper) -> None:
    """The engine's loop may handle both calls without a call to its scheduler in between."""
    serve(engine)
    engine.sleep()
    engine.wake()
    engine.sleep()
    engine.wake()
    serve(engine)
    engine.check()


def test_a_plan_that_was_not_sent_before_the_sleep_is_not_sent_after_it(engine: Sleeper) -> None:
    serve(engine)
    engine.pause()
    engine.scheduler.kv_memory._governor._shrink_to(1)
    assert engine.scheduler.kv_memory._governor.plan_gives_back
    with engine.memory.sleep.falling_asleep(TAGS):
        pass
    check_asleep(engine)
    engine.wake()
    serve(engine)


def test_requests_that_arrive_during_sleep_wait_and_demand_no_memory(engine: Sleeper) -> None:
    engine.sleep()
    queued, aborted = request(200, 5), request(200, 5)
    for one in (queued, aborted):
        engine.scheduler.add_request(one)
    check_asleep(engine)
    engine.scheduler.finish_requests(aborted.request_id, RequestStatus.FINISHED_ABORTED)
    while engine.scheduler.has_requests():  # the worker still has to learn that a request has ended
        output = engine.step()
        assert output.total_num_scheduled_tokens == 0 and not hasattr(output, "kvcached_plan")
    check_asleep(engine)
    engine.wake()
    engine.idle()
    assert engine.answers == {queued.request_id: 5}


def test_requests_that_a_sleep_keeps_are_computed_again_and_lose_no_token(engine: Sleeper) -> None:
    kept = [request(100, 30) for _ in range(4)]
    for one in kept:
        engine.scheduler.add_request(one)
    for _ in range(12):
        engine.step()
    assert 0 < engine.answers[kept[0].request_id] < 30 and len(engine.scheduler.running) > 1
    engine.sleep("keep")
    check_asleep(engine)
    engine.wake()
    engine.idle()
    assert [engine.answers[one.request_id] for one in kept] == [30] * 4


def test_the_cache_alone_can_be_released_and_the_rest_sleep_later(engine: Sleeper) -> None:
    serve(engine)
    engine.discard()
    check_asleep(engine)
    engine.sleep()
    check_asleep(engine)
    engine.wake(["weights"])
    check_asleep(engine)
    engine.wake(["kv_cache"])
    serve(engine)
    engine.discard()
    engine.wake()
    serve(engine)


def test_an_error_from_vllm_leaves_the_engine_as_awake_as_before(engine: Sleeper) -> None:
    serve(engine)
    engine.pause()
    with pytest.raises(ZeroDivisionError), engine.memory.sleep.falling_asleep(TAGS):
        raise ZeroDivisionError
    engine.wake()
    serve(engine)
    engine.sleep()
    with pytest.raises(ZeroDivisionError), engine.memory.sleep.waking_up(None):
        raise ZeroDivisionError
    check_asleep(engine)
    engine.wake()
    serve(engine)


def test_a_sleep_under_requests_that_hold_blocks_is_an_error_and_no_wrong_output(engine: Sleeper) -> None:
    """vLLM never does that. A direct call to the workers could."""
    engine.scheduler.add_request(request(300, 20))
    for _ in range(6):
        engine.step()
    with engine.memory.sleep.falling_asleep(TAGS):
        pass
    with pytest.raises(InvariantError, match="requests hold 2 granules of a cache that was dropped"):
        engine.scheduler.schedule()


def test_an_engine_cannot_sleep_before_it_serves(config: Any, tmp_path: Path) -> None:
    from tests.vllm.test_worker_units import worker

    with pytest.raises(InvariantError, match="before it serves"):
        worker(config, runtime_dir=str(tmp_path / "run")).sleep.falling_asleep(TAGS)


def test_another_engine_has_the_memory_of_one_that_sleeps_and_gives_it_back_when_it_wakes(
    config: Any, tmp_path: Path
) -> None:
    chosen = {"host_capacity": "16MiB", "limit": "16MiB"}
    with (
        sleeper(config, tmp_path / "run", **chosen) as a,
        sleeper(config, tmp_path / "run", "b", **chosen) as b,
    ):
        serve(a, 12, 100, 60)
        assert a.held_bytes > 6 * MIB
        a.sleep()
        check_asleep(a)
        for _ in range(2):
            serve(b, 20, 100, 60)
        assert b.held_bytes > 12 * MIB, "mostly cache, which fills what nobody needs"
        a.memory._start._wait = lambda fd, seconds: b.idle()  # an idle engine acts when its doorbell rings
        a.wake()
        assert b.held_bytes <= 14 * MIB, "the floor of 2 MiB"
        serve(a, 12, 100, 60, beside=b)
        assert a.held_bytes > 3 * MIB, "more than its floor"
        a.check()
        b.check()


def test_an_engine_without_room_stays_asleep_and_wakes_later(config: Any, tmp_path: Path) -> None:
    chosen: Any = {"host_capacity": "32MiB", "limit": "24MiB", "start_seconds": 0.01}
    with (
        sleeper(config, tmp_path / "run", **chosen) as a,
        sleeper(config, tmp_path / "run", "b", **chosen) as b,
    ):
        serve(a)
        a.sleep()
        for _ in range(3):
            serve(b, 20, 100, 60)
        a.memory._start._bytes_to_wake = 20 * MIB  # as if weights had been freed
        with pytest.raises(CapacityError, match=r"no room to wake up within 0\.01 s"):
            a.wake()
        check_asleep(a)
        b.idle()  # another engine asked for memory
        a.wake()
        serve(a)


def test_controls_set_during_sleep_hold_after_waking(engine: Sleeper) -> None:
    serve(engine)
    engine.sleep()
    runtime = Runtime(engine.runtime.path)
    set_limit(runtime, engine.owner().name, 8 * MIB)
    set_floor(runtime, engine.owner().name, 4 * MIB)
    check_asleep(engine)
    engine.wake()
    serve(engine, 12)
    assert engine.held_bytes <= 8 * MIB and engine.owner().floor_applied == 4 * MIB
