"""An engine for tests of sleep mode, without a model: an elastic scheduler and a real worker's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.request import RequestStatus

from kvcached_core.ledger import OwnerSnapshot, Runtime, snapshot
from kvcached_core.worker.pool import ElasticPool
from tests.vllm.engines import finish_step, scheduler
from tests.vllm.test_worker_units import BLOCK_BYTES, CPU, SPECS, kv_config, worker
from vllm_kvcached.scheduler import ElasticScheduler
from vllm_kvcached.sleeping import TAGS
from vllm_kvcached.worker_memory import WorkerMemory

MIB = 1 << 20


class Sleeper:
    """Makes the calls of vLLM's engine core, in the same order."""

    def __init__(self, config: Any, runtime_dir: Path, name: str, **settings: Any) -> None:
        config.instance_id = name
        options = {"headroom": "0", "spare": "1MiB", "idle_seconds": 0.5, "grant_seconds": 0, "floor": "2MiB",
                   "start_seconds": 5}  # fmt: skip
        self.runtime = Runtime.open(runtime_dir)
        self.memory: WorkerMemory = worker(config, runtime_dir=str(runtime_dir), **{**options, **settings})
        self.memory.open(CPU)
        self.memory.wait_for_room()
        size = self.memory.virtual_bytes(SPECS)
        self.memory.allocate(kv_config(size // BLOCK_BYTES), size)
        self.pool.supply_thread.start = lambda: None  # type: ignore[method-assign]  # it is called by hand
        self.memory.begin_service(0)
        self.scheduler = scheduler(ElasticScheduler, config, size // BLOCK_BYTES)
        self.now = 1000.0
        self.scheduler.kv_memory._clock = lambda: self.now
        self.answers: dict[str, int] = {}
        self.sleeping: set[str] = set()

    @property
    def pool(self) -> ElasticPool:
        assert self.memory._pool is not None
        return self.memory._pool

    @property
    def blocks_per_granule(self) -> int:
        return int(self.scheduler.kv_memory.granules.blocks_per_granule)

    def owner(self) -> OwnerSnapshot:
        """Return this engine's slot in a snapshot of the ledger."""
        owners = [owner for device in snapshot(self.runtime) for owner in device.owners]
        return next(owner for owner in owners if owner.slot == self.memory._start.account.slot)

    @property
    def held_bytes(self) -> int:
        """Bytes of the allocation handles that exist."""
        driver: Any = self.memory._opened()
        return int(sum(driver._table.sizes.values()))

    def step(self) -> Any:
        """Run one step, then all work that the supply thread has to do."""
        output = self.scheduler.schedule()
        plan = getattr(output, "kvcached_plan", None)
        if plan is not None:
            self.memory.apply(plan)
        self.check()
        for outputs in finish_step(self.scheduler, output).values():
            for answer in outputs.outputs:
                count = len(answer.new_token_ids)
                self.answers[answer.request_id] = self.answers.get(answer.request_id, 0) + count
        self.pool.sleep.take_turn()
        return output

    def idle(self, beside: Sleeper | None = None) -> None:
        """Step while the engine has work. An engine `beside` it is stepped after each step too."""
        for _ in range(400):
            if not self.scheduler.has_requests():
                return
            self.step()
            if beside is not None:
                beside.idle()
        raise AssertionError("the engine does not come to rest")

    def sleep(self, mode: str = "abort") -> None:
        """Pause, wait for the steps in flight, reset the caches, and put the workers to sleep."""
        self.pause(mode)
        with self.memory.sleep.falling_asleep(TAGS):
            pass
        self.sleeping |= TAGS

    def pause(self, mode: str = "abort") -> None:
        """Pause and reset the caches, as falling asleep does."""
        if mode == "abort":
            self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)
        self.idle()
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def discard(self, mode: str = "keep") -> None:
        """Release the KV cache, and nothing else."""
        self.pause(mode)
        with self.memory.sleep.falling_asleep(("kv_cache",)):
            pass
        self.sleeping |= {"kv_cache"}

    def wake(self, tags: list[str] | None = None) -> None:
        """Wake the parts that these tags name; resume the scheduler once all parts are awake."""
        with self.memory.sleep.waking_up(tags):
            pass
        self.sleeping -= TAGS if tags is None else set(tags)
        if not self.sleeping:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)

    def check(self) -> None:
        """Assert that scheduler and worker add up, and that both map the same granules (I5)."""
        self.memory.check()
        self.scheduler.kv_memory.check()
        if self.scheduler.kv_memory._scheduler_view.released() > self.scheduler.kv_memory._governor.released:
            return  # the scheduler has not noticed the sleep yet; it does so before it plans
        mapped_set = self.scheduler.kv_memory.granules.mapped_set
        live = (
            set(self.pool._arenas.mapped) - self.pool._deferred.granules() - self.pool._premapped.granules()
        )
        assert set(mapped_set.granules()) - mapped_set._to_map | mapped_set._to_unmap == live, "I5"

    def close(self) -> None:
        """End both."""
        self.scheduler.shutdown()
        self.memory.close()


@contextmanager
def sleeper(config: Any, runtime_dir: Path, name: str = "one", **settings: Any) -> Iterator[Sleeper]:
    """Run an engine during the block; afterwards end it and restore vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineCoreProc, "_process_input_queue", EngineCoreProc._process_input_queue)
        made = Sleeper(config, runtime_dir, name, **settings)
        yield made
        made.close()
