"""The elastic scheduler alone on a device: requests, limits, usage, and its base classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCoreProc

from kvcached_core.errors import LedgerError, UnsupportedError
from tests.vllm.elastic import COUNT, GRANULE, SIZE, Engine, FakeWorker, running
from tests.vllm.engines import BLOCK_TOKENS, request, scheduler, vllm_config
from vllm_kvcached.scheduler import ElasticScheduler


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of every engine in this file."""
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(config: Any, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine. An indirect parameter sets its limit."""
    with running(config, getattr(request, "param", COUNT)) as made:
        yield made


def test_requests_end_and_memory_goes_up_and_down(engine: Engine) -> None:
    requests = [request(40 + 11 * n, 30) for n in range(6)]
    for each in requests:
        engine.scheduler.add_request(each)
    engine.run()
    assert engine.answers == {each.request_id: 30 for each in requests}
    assert engine.memory.granules.used_blocks == 1 and max(len(p.map) for p in engine.worker.plans) > 0
    assert engine.memory.granules.cached_blocks > 0, (
        "what was cached stays as long as nobody needs the memory"
    )
    assert engine.scheduler.reset_prefix_cache()
    engine.step()  # tells the worker which requests have ended
    assert not engine.scheduler.has_requests()
    engine.now += 10.0
    engine.scheduler.has_requests()
    engine.now += 10.0
    while engine.scheduler.has_requests():
        engine.step()
    assert (engine.worker.mapped, engine.worker.held) == ({0}, 1), "idle, it has given back all but granule 0"
    assert [plan.sequence for plan in engine.worker.plans] == list(range(len(engine.worker.plans)))


def test_a_request_waits_for_its_memory_and_the_demand_is_published(engine: Engine) -> None:
    engine.scheduler.add_request(request(200, 4))
    output = engine.step(grant=False)
    assert output.total_num_scheduled_tokens == 0 and engine.scheduler.has_unfinished_requests()
    assert engine.worker.account.wanted_bytes >= 4 * GRANULE
    assert 0 < sum(engine.slept) <= 0.021, "a step waits a moment for what is on its way"
    engine.worker.grant()
    engine.run()
    assert list(engine.answers.values()) == [4] and engine.failed == []


def test_memory_that_comes_while_a_step_waits_is_used_by_it(engine: Engine) -> None:
    engine.memory._sleep = lambda seconds: engine.worker.grant()
    engine.scheduler.add_request(request(40, 2))
    assert engine.step(grant=False).total_num_scheduled_tokens == 40


@pytest.mark.parametrize("engine", [4], indirect=True)
def test_a_request_over_the_limit_ends_with_an_error_to_its_client(engine: Engine) -> None:
    too_long, fits = request(16 * BLOCK_TOKENS, 1, client=3), request(5 * BLOCK_TOKENS, 2)
    engine.step()
    assert engine.memory.limit_blocks == 15
    engine.scheduler.add_request(too_long)
    engine.scheduler.add_request(fits)
    engine.run()
    assert engine.failed == [(3, too_long.request_id)] and engine.answers[fits.request_id] == 2


@pytest.mark.parametrize("engine", [4], indirect=True)
def test_a_request_that_grows_over_the_limit_ends_with_an_error(engine: Engine) -> None:
    grows = request(14 * BLOCK_TOKENS, 100)
    engine.scheduler.add_request(grows)
    engine.run()
    assert engine.failed == [(0, grows.request_id)] and engine.answers[grows.request_id] == BLOCK_TOKENS + 1


@pytest.mark.parametrize("engine", [8], indirect=True)
def test_i2_a_lower_limit_preempts_no_request_that_fits_and_the_others_later(engine: Engine) -> None:
    requests = [request(60, 80) for _ in range(6)]
    for each in requests:
        engine.scheduler.add_request(each)
    engine.run()
    assert engine.failed == [] and set(engine.answers.values()) == {80}
    assert engine.worker.held <= 8 and engine.scheduler._kv_demand.preemptions > 0


def test_usage_is_used_over_attainable_blocks(engine: Engine) -> None:
    assert engine.scheduler.get_kv_cache_usage() == 0.0
    engine.scheduler.add_request(request(200, 50))
    for _ in range(6):
        engine.step()
    usage = engine.scheduler.get_kv_cache_usage()
    assert usage == pytest.approx((engine.memory.granules.used_blocks - 1) / (SIZE * COUNT - 1))
    assert 0 < usage < 1 and engine.scheduler.make_stats().kv_cache_usage == usage


def test_has_requests_is_true_without_requests_only_while_memory_is_owed(engine: Engine) -> None:
    engine.scheduler.add_request(request(100, 2))
    engine.run()
    engine.step()
    assert not engine.scheduler.has_requests(), "cached blocks are no reason to run"
    engine.worker.account.acknowledge()
    engine.now += 10.0
    engine.scheduler.has_requests()
    engine.now += 10.0
    assert engine.scheduler.has_requests(), "the spare granules were not needed"
    engine.step()
    assert not engine.scheduler.has_requests()
    engine.memory.close()
    engine.now += 100.0
    assert not engine.scheduler.has_requests(), "never while it shuts down"


def test_the_scheduler_is_the_elastic_form_of_the_one_vllm_would_use(engine: Engine, config: Any) -> None:
    assert isinstance(engine.scheduler, Scheduler) and not isinstance(engine.scheduler, AsyncScheduler)
    assert type(engine.scheduler).__name__ == "ElasticScheduler"


def test_an_asynchronous_scheduler_stays_asynchronous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", EngineCoreProc._process_input_queue)
    config = vllm_config(tmp_path)
    config.scheduler_config.async_scheduling = True
    worker = FakeWorker(config)
    made = scheduler(ElasticScheduler, config, SIZE * COUNT)
    assert isinstance(made, AsyncScheduler) and type(made).__name__ == "ElasticAsyncScheduler"
    made.shutdown()
    worker.leave()


def test_unsupported_options_are_refused_before_anything_is_created(config: Any) -> None:
    config.cache_config.num_gpu_blocks_override = 10
    try:
        with pytest.raises(UnsupportedError, match="num_gpu_blocks_override"):
            scheduler(ElasticScheduler, config, 64)
    finally:
        config.cache_config.num_gpu_blocks_override = None


def test_a_scheduler_without_its_worker_raises_an_error_that_says_so(config: Any) -> None:
    with pytest.raises(LedgerError, match=r"no living worker of instance .* with rank 0"):
        scheduler(ElasticScheduler, config, 64)
