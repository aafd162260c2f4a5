"""Requests, sleeps, wakes, limits and another engine's leases in any order: all counts stay consistent."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import CapacityError
from kvcached_core.ledger import Account, check, set_limit, snapshot
from tests.vllm.engines import request, vllm_config
from tests.vllm.sleeper import MIB, Sleeper, sleeper

CAPACITY = 24 * MIB
_config: Any = None


class SleepMachine(RuleBasedStateMachine):
    """An engine of 24 granules beside another engine that leases memory and gives it back."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.context = sleeper(_config, Path(self.folder.name) / "run", host_capacity=str(CAPACITY),
                               limit=str(CAPACITY), start_seconds=0.001)  # fmt: skip
        self.engine: Sleeper = self.context.__enter__()
        self.asked: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.other = Account.attach(self.engine.runtime, DeviceIdentity("host", "host"), CAPACITY, 0,
                                    instance="other", rank=0, name="other")  # fmt: skip
        self.other.describe(page_bytes=MIB, granule_bytes=MIB, granule_count=24, blocks_per_granule=1,
                            block_count=24, stride_bytes=MIB)  # fmt: skip

    def is_awake(self) -> bool:
        return not self.engine.sleeping

    def is_asleep(self) -> bool:
        return bool(self.engine.sleeping)

    @rule(prompt=st.integers(1, 200), answer=st.integers(1, 30))
    def ask(self, prompt: int, answer: int) -> None:
        one = request(prompt, answer)
        self.asked[one.request_id] = answer
        self.engine.scheduler.add_request(one)

    @rule(steps=st.integers(1, 20))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.engine.scheduler.has_requests():
                self.engine.step()

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.engine.now += seconds

    @precondition(is_awake)
    @rule(keeps=st.booleans(), alone=st.booleans(), flushes=st.booleans())
    def sleep(self, keeps: bool, alone: bool, flushes: bool) -> None:
        if not keeps:
            self.aborted |= {one.request_id for one in self.engine.scheduler.requests.values()}
        (self.engine.discard if alone else self.engine.sleep)("keep" if keeps else "abort")
        if flushes:
            self.engine.scheduler.has_requests()

    @precondition(is_asleep)
    @rule(which=st.sampled_from(["all", "weights", "kv_cache", "sleep"]))
    def wake(self, which: str) -> None:
        if which == "sleep" and "weights" not in self.engine.sleeping:
            self.engine.sleep("keep")
        elif which == "all" or which in self.engine.sleeping:
            before = set(self.engine.sleeping)
            try:
                self.engine.wake(None if which == "all" else [which])
            except CapacityError:
                assert self.other.leased_bytes > CAPACITY - 3 * MIB, "there was room for its floor of 2 MiB"
                assert self.engine.sleeping == before

    @rule(megabytes=st.integers(2, 24))
    def limit(self, megabytes: int) -> None:
        set_limit(self.engine.runtime, self.engine.owner().name, megabytes * MIB)

    @rule(granules=st.integers(1, 20))
    def other_takes(self, granules: int) -> None:
        free = MemoryInfo(CAPACITY, CAPACITY)
        self.other.created(self.other.lease(min(granules, 20) * MIB, free) // MIB)

    @rule(granules=st.integers(1, 20))
    def other_gives(self, granules: int) -> None:
        self.other.refuse(0)
        self.other.give_back(granules_released=min(granules, self.other.ready_bytes // MIB))

    @precondition(is_asleep)
    @invariant()
    def holds_the_null_granule_alone(self) -> None:
        assert self.engine.held_bytes == self.engine.owner().leased_bytes == MIB

    @invariant()
    def adds_up(self) -> None:
        self.engine.check()
        self.other.check()
        (device,) = snapshot(self.engine.runtime)
        assert check(device) == []

    def teardown(self) -> None:
        """Wake the engine, free the device, and assert that all requests but the aborted are answered."""
        engine = self.engine
        self.other.give_back(granules_released=self.other.ready_bytes // MIB)
        self.other.detach()
        set_limit(engine.runtime, engine.owner().name, CAPACITY)
        if engine.sleeping:
            engine.wake()
        engine.pool.sleep.take_turn()
        engine.idle()
        for name, answer in self.asked.items():
            assert engine.answers.get(name, 0) == answer or name in self.aborted
        self.context.__exit__(None, None, None)
        self.folder.cleanup()


def test_any_history_of_sleeping_and_waking_adds_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _config
    _config = vllm_config(tmp_path_factory.mktemp("model"))
    SleepMachine.TestCase.settings = settings(
        max_examples=100, stateful_step_count=25, phases=(Phase.explicit, Phase.generate), deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    SleepMachine.TestCase().runTest()
