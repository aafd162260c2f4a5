"""An elastic scheduler on a real ledger. A fake worker creates memory when the test tells it to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCoreProc

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Account, Runtime
from kvcached_core.plan import Plan
from tests.vllm.engines import finish_step, scheduler
from vllm_kvcached.scheduler import ElasticScheduler
from vllm_kvcached.support import instance

SIZE, COUNT = 4, 32  # blocks of a granule, granules
GRANULE = 1 << 20
CAPACITY = COUNT * GRANULE


class FakeWorker:
    """Holds the memory of one rank: creates the memory that the scheduler wants, and carries out plans."""

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
        """Lease and create this many granules; by default all that the scheduler wants."""
        missing = self.account.wanted_bytes // GRANULE - self.held if granules is None else granules
        if missing > 0:
            free = MemoryInfo(CAPACITY - self.held * GRANULE, CAPACITY)
            got = self.account.lease(missing * GRANULE, free) // GRANULE
            self.account.created(got)
            self.held += got

    def apply(self, output: Any) -> Plan | None:
        """Carry out the memory plan of a step, if there is one."""
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
        """Give all memory back and leave the ledger."""
        self.account.give_back(self.account.leased_bytes - self.account.ready_bytes, self.held)
        self.account.detach()


class Engine:
    """A scheduler, a fake worker, and a clock that advances only when the scheduler sleeps."""

    def __init__(self, config: Any, limit: int = COUNT) -> None:
        self.worker = FakeWorker(config, limit)
        self.scheduler = scheduler(ElasticScheduler, config, SIZE * COUNT)
        self.memory = self.scheduler.kv_memory
        self.now = 1000.0
        self.slept: list[float] = []
        self.memory._clock = lambda: self.now
        self.memory._sleep = self.sleep
        self.tokens: dict[str, list[int]] = {}
        self.failed: list[tuple[int, str]] = []

    def sleep(self, seconds: float) -> None:
        """Advance the clock. Tests replace this method to create memory meanwhile."""
        self.now += seconds
        self.slept.append(seconds)

    def ask(self, target: int = 0, must: int = 0) -> None:
        """Ask for the memory above `target` or `must` granules, as another engine's lease does; 0 ends it."""
        (slot,) = self.memory._scheduler_view._slots
        slot.set("target_bytes", target * GRANULE)
        slot.set("must_bytes", must * GRANULE)
        slot.set("asked_until_ms", 1 << 50 if target or must else 0)

    def begin_step(self, grant: bool = True) -> Any:
        """Schedule a step and let the worker carry out its plan."""
        output = self.scheduler.schedule()
        self.worker.apply(output)
        self.memory.check()
        if grant:
            self.worker.grant()
        return output

    def finish_step(self, output: Any) -> None:
        """Give the model's answer to a step to the scheduler."""
        for client, outputs in finish_step(self.scheduler, output).items():
            for answer in outputs.outputs:
                self.tokens.setdefault(answer.request_id, []).extend(answer.new_token_ids)
                if answer.finish_reason is FinishReason.ERROR:
                    self.failed.append((client, answer.request_id))

    def step(self, grant: bool = True) -> Any:
        """Run one step; return the scheduler's output."""
        output = self.begin_step(grant)
        self.finish_step(output)
        return output

    @property
    def answers(self) -> dict[str, int]:
        """The number of tokens that each request got."""
        return {name: len(tokens) for name, tokens in self.tokens.items()}

    def run(self, bound: int = 300) -> None:
        """Run steps until no request is left."""
        for _ in range(bound):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("requests do not come to an end")


@contextmanager
def running(config: Any, limit: int = COUNT) -> Iterator[Engine]:
    """Run an engine during the block; afterwards end it and restore vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineCoreProc, "_process_input_queue", EngineCoreProc._process_input_queue)
        made = Engine(config, limit)
        yield made
        made.scheduler.shutdown()
        made.worker.leave()
