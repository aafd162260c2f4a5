"""The elastic scheduler on a real ledger; the worker is an account that grants when the test says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCoreProc

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import LedgerError, UnsupportedError
from kvcached_core.ledger import Account, Runtime
from kvcached_core.plan import Plan
from tests.vllm.engines import BLOCK_TOKENS, finish_step, request, scheduler, vllm_config
from vllm_kvcached.scheduler import ElasticScheduler
from vllm_kvcached.support import instance

SIZE, COUNT = 4, 32  # blocks of a granule, granules
GRANULE = 1 << 20
CAPACITY = COUNT * GRANULE


class FakeWorker:
    """Owns the memory: grants what is wanted, and carries out plans."""

    def __init__(self, config: Any, limit: int = COUNT) -> None:
        self.account = Account.attach(
            Runtime.open(None), DeviceIdentity("host", "host"), CAPACITY, 0, instance=instance(config),
            rank=0, name="m", engine="vllm", model="tiny", limit_bytes=limit * GRANULE, floor_bytes=0,
        )  # fmt: skip
        self.account.describe(
            page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=COUNT, blocks_per_granule=SIZE,
            block_count=SIZE * COUNT, stride_bytes=GRANULE // SIZE,
        )  # fmt: skip
        self.mapped, self.held, self.released = {0}, 0, 0
        self.plans: list[Plan] = []
        self.grant(1)

    def grant(self, granules: int | None = None) -> None:
        """Create as many granules, or all that are wanted."""
        missing = self.account.wanted_bytes // GRANULE - self.held if granules is None else granules
        if missing > 0:
            free = MemoryInfo(CAPACITY - self.held * GRANULE, CAPACITY)
            got = self.account.lease(missing * GRANULE, free) // GRANULE
            self.account.created(got)
            self.held += got

    def apply(self, output: Any) -> Plan | None:
        """Carry out the plan that a step brings, if it brings one."""
        plan: Plan | None = getattr(output, "kvcached_plan", None)
        if plan is not None:
            self.mapped = self.mapped - set(plan.unmap) | set(plan.map)
            released = plan.released - self.released
            self.held, self.released = self.held - released, plan.released
            assert len(self.mapped) <= self.held, "I5"
            self.account.give_back(0, released)
            self.plans.append(plan)
        return plan

    def leave(self) -> None:
        """Let everything go."""
        self.account.give_back(self.account.leased_bytes - self.account.ready_bytes, self.held)
        self.account.detach()


class Engine:
    """Scheduler and worker, and a clock that moves only where the scheduler sleeps."""

    def __init__(self, config: Any, limit: int = COUNT) -> None:
        self.worker = FakeWorker(config, limit)
        self.scheduler = scheduler(ElasticScheduler, config, SIZE * COUNT)
        self.memory = self.scheduler.kv_memory
        self.now = 1000.0
        self.slept: list[float] = []
        self.memory._clock = lambda: self.now
        self.memory._sleep = self.sleep
        self.answers: dict[str, int] = {}
        self.failed: list[tuple[int, str]] = []

    def sleep(self, seconds: float) -> None:
        """Let time pass; the worker grants meanwhile if the test has said so."""
        self.now += seconds
        self.slept.append(seconds)

    def step(self, grant: bool = True) -> Any:
        """Run one step; return what the scheduler put out."""
        output = self.scheduler.schedule()
        self.worker.apply(output)
        self.memory.check()
        if grant:
            self.worker.grant()
        for client, outputs in finish_step(self.scheduler, output).items():
            for answer in outputs.outputs:
                self.answers[answer.request_id] = self.answers.get(answer.request_id, 0) + len(
                    answer.new_token_ids
                )
                if answer.finish_reason is FinishReason.ERROR:
                    self.failed.append((client, answer.request_id))
        return output

    def run(self, bound: int = 300) -> None:
        """Run until no request is left."""
        for _ in range(bound):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("requests do not come to an end")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One configuration for all engines here."""
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(config: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine, with the limit that a test asks for by an indirect parameter."""
    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", EngineCoreProc._process_input_queue)
    made = Engine(config, getattr(request, "param", COUNT))
    yield made
    made.scheduler.shutdown()
    made.worker.leave()


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


def test_a_request_waits_for_its_memory_and_says_what_it_wants(engine: Engine) -> None:
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
def test_i2_a_lower_limit_preempts_nobody_who_fits_and_the_rest_later(engine: Engine) -> None:
    requests = [request(60, 80) for _ in range(6)]
    for each in requests:
        engine.scheduler.add_request(each)
    engine.run()
    assert engine.failed == [] and set(engine.answers.values()) == {80}
    assert engine.worker.held <= 8 and engine.scheduler._kv_demand.preemptions > 0


def test_usage_is_of_what_can_be_attained(engine: Engine) -> None:
    assert engine.scheduler.get_kv_cache_usage() == 0.0
    engine.scheduler.add_request(request(200, 50))
    for _ in range(6):
        engine.step()
    usage = engine.scheduler.get_kv_cache_usage()
    assert usage == pytest.approx((engine.memory.granules.used_blocks - 1) / (SIZE * COUNT - 1))
    assert 0 < usage < 1 and engine.scheduler.make_stats().kv_cache_usage == usage


def test_has_requests_is_true_for_memory_only_while_some_is_owed(engine: Engine) -> None:
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


def test_the_scheduler_is_the_elastic_form_of_the_one_vllm_would_take(engine: Engine, config: Any) -> None:
    assert isinstance(engine.scheduler, Scheduler) and not isinstance(engine.scheduler, AsyncScheduler)
    assert type(engine.scheduler).__name__ == "ElasticScheduler"


def test_an_asynchronous_scheduler_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", EngineCoreProc._process_input_queue)
    config = vllm_config(tmp_path)
    config.scheduler_config.async_scheduling = True
    worker = FakeWorker(config)
    made = scheduler(ElasticScheduler, config, SIZE * COUNT)
    assert isinstance(made, AsyncScheduler) and type(made).__name__ == "ElasticAsyncScheduler"
    made.shutdown()
    worker.leave()


def test_what_is_not_supported_is_refused_before_anything_is_made(config: Any) -> None:
    config.cache_config.num_gpu_blocks_override = 10
    try:
        with pytest.raises(UnsupportedError, match="num_gpu_blocks_override"):
            scheduler(ElasticScheduler, config, 64)
    finally:
        config.cache_config.num_gpu_blocks_override = None


def test_a_scheduler_without_its_worker_says_so(config: Any) -> None:
    with pytest.raises(LedgerError, match=r"no living worker of instance .* with rank 0"):
        scheduler(ElasticScheduler, config, 64)
