"""vLLM's scheduler with a memory budget that changes between its steps."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from vllm_kvcached import wake
from vllm_kvcached.demand import Demand
from vllm_kvcached.scheduler_memory import SchedulerMemory
from vllm_kvcached.support import refuse_unsupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)


class ElasticSchedulerMixin(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]
    """Adds elastic memory to either of vLLM's schedulers. The block pool stays vLLM's own."""

    _pause_state: PauseState

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        refuse_unsupported(vllm_config)
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        self.kv_memory = SchedulerMemory(vllm_config, self.kv_cache_manager)
        self._kv_demand = Demand(self)
        self._kv_failed: list[Request] = []
        wake.install()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Set this step's memory budget, schedule as vLLM does, and attach the memory plan to the output."""
        memory, demand = self.kv_memory, self._kv_demand
        # A paused engine admits no request, and a sleeping engine is paused.
        is_paused = self._pause_state != PauseState.UNPAUSED
        demanded = demand.growth_blocks() if is_paused else demand.next_blocks()
        memory.update(demanded, self.has_unfinished_requests(), demand.growth_blocks())
        preempted = self._preempt_for_a_floor()
        while (too_long := demand.request_over_limit(memory.limit_blocks)) is not None:
            self._fail(too_long)
        if not preempted:
            memory.wait_while(demand.is_short)
        # As in vLLM, a step that preempted admits no request. Nor does a step of an engine above its target
        # (the memory that other engines leave to it). If nothing runs it admits: else no request would end.
        admits = not (preempted or (memory.over_target and self.running))
        with contextlib.nullcontext() if admits else self._without_admission():
            output: SchedulerOutput = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens == 0 and memory.is_all_here:
            stuck = demand.request_over_free_blocks()
            if stuck is not None:
                self._fail(stuck)
        demand.note_step(output)
        plan = memory.take_plan(demand.preemptions)
        if plan is not None:
            output.kvcached_plan = plan
        return output

    def has_requests(self) -> bool:
        """As in vLLM; also True while memory must be given back, even by requests that a pause holds."""
        memory = self.kv_memory
        return super().has_requests() or memory.owes_when_idle() or bool(self.running and memory.must_preempt)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """As in vLLM; also answer requests that can never fit with an error."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self._kv_failed:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ERROR)
            )
        self._kv_failed.clear()
        return outputs

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As in vLLM. The memory of the dropped blocks can then be given back."""
        done: bool = super().reset_prefix_cache(*args, **kwargs)
        if done:
            self.kv_memory.queue.forget_unhashed()
        return done

    def get_kv_cache_usage(self) -> float:
        """Return used blocks over attainable blocks, 0 to 1. Routers balance load by it."""
        return self.kv_memory.usage

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, with the usage of `get_kv_cache_usage`."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_cache_usage = self.kv_memory.usage
        return stats

    def shutdown(self) -> None:
        """As in vLLM; then close this engine's view of the ledger."""
        try:
            super().shutdown()
        finally:
            self.kv_memory.close()

    def _preempt_for_a_floor(self) -> int:
        """Preempt requests until this engine holds no memory of other engines' floors; return how many."""
        memory, preempted = self.kv_memory, 0
        while self.running and memory.must_preempt:
            if self.policy == SchedulingPolicy.PRIORITY:
                victim = max(self.running, key=lambda request: (request.priority, request.arrival_time))
                self.running.remove(victim)
            else:
                victim = self.running.pop()
            # vLLM delivers the request's steps in flight before it resumes it, so the outputs do not change.
            self._preempt_request(victim, time.monotonic())
            preempted += 1
        if preempted:
            memory.release_preempted(
                self._kv_demand.next_blocks(), self._kv_demand.growth_blocks(), preempted
            )
        return preempted

    @contextlib.contextmanager
    def _without_admission(self) -> Iterator[None]:
        before = self._pause_state
        self._pause_state = max(before, PauseState.PAUSED_NEW)
        try:
            yield
        finally:
            self._pause_state = before

    def _fail(self, request: Request) -> None:
        _log.error(
            "kvcached: request %s has %d tokens, which do not fit into the limit of %d blocks: "
            "it ends with an error. Raise the limit (kvctl limit) or send a shorter request",
            request.request_id, request.num_tokens, self.kv_memory.limit_blocks,
        )  # fmt: skip
        self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        self._kv_failed.append(request)


@functools.cache
def _elastic_class(base: type) -> type:
    return type(f"Elastic{base.__name__}", (ElasticSchedulerMixin, base), {})


class ElasticScheduler:
    """The class that `--scheduler-cls` names. Creates the elastic form of the scheduler vLLM would use."""

    def __new__(cls, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> Any:
        """Return a scheduler, asynchronous or not as configured."""
        base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
        return _elastic_class(base)(*args, vllm_config=vllm_config, **kwargs)
