"""vLLM's worker with an elastic KV cache, which maps and unmaps memory as the scheduler plans."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.platforms import current_platform

from kvcached_core.errors import KVCachedError
from vllm_kvcached.sleeping import TAGS, others_may_grow
from vllm_kvcached.support import refuse_unsupported
from vllm_kvcached.worker_memory import WorkerMemory

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _StockWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as _StockWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

_log = logging.getLogger(__name__)
_MODEST_UTILIZATION = 0.01


class _KVCacheAllocation(TorchFunctionMode):
    """Makes vLLM's allocation of its KV cache, `torch.zeros(size, dtype=torch.int8)`, return the pool."""

    def __init__(self, size_bytes: int, make: Any) -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._make = make
        self.answered = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and args == (self._size_bytes,):
            self.answered += 1
            return self._make()
        return func(*args, **kwargs)


@contextmanager
def _modest(vllm_config: VllmConfig) -> Iterator[None]:
    """Lower gpu_memory_utilization for vLLM's check that all memory is free at the start.

    An elastic cache takes its memory later.
    """
    cache = vllm_config.cache_config
    wanted = cache.gpu_memory_utilization
    cache.gpu_memory_utilization = min(wanted, _MODEST_UTILIZATION)
    try:
        yield
    finally:
        cache.gpu_memory_utilization = wanted


@contextmanager
def _others_may_give_back(snapshot: Any) -> Iterator[None]:
    """Let vLLM's profiling pass while other engines give memory back.

    vLLM raises an error if free memory grows. Its result, computed from free memory, is not used.
    """
    measured_bytes = snapshot.free_memory
    snapshot.free_memory = snapshot.total_memory
    try:
        yield
    finally:
        snapshot.free_memory = measured_bytes


def _part_of_start(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method: if it fails, log one line, give all memory back and leave the ledger."""

    @functools.wraps(method)
    def wrapped(self: ElasticWorker, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            if isinstance(error, KVCachedError):
                _log.error("kvcached: this engine cannot start: %s", error)
            try:
                self.kv_memory.close()
            except Exception:
                _log.exception(
                    "kvcached: some memory was not given back; the system frees it when this process ends"
                )
            raise

    return wrapped


class ElasticWorker(_StockWorker):
    """vLLM's worker for this platform, with an elastic KV cache."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        refuse_unsupported(vllm_config)
        with _modest(vllm_config):
            super().__init__(vllm_config, *args, **kwargs)
        self.kv_memory = WorkerMemory(vllm_config, self.rank)

    @_part_of_start
    def init_device(self) -> None:
        """As in vLLM; then wait until every rank of the engine may load."""
        if not current_platform.is_cpu():
            self.kv_memory.make_room_for_context(self.local_rank)
        with _modest(self.vllm_config):
            super().init_device()
        if not current_platform.is_cpu():
            self.requested_memory = self.init_snapshot.free_memory
        self.kv_memory.open(self.device)
        self.kv_memory.wait_for_room()

    @_part_of_start
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As in vLLM."""
        super().load_model(*args, **kwargs)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Prefer layouts in which a block is one piece: they make the smallest granules."""
        names: list[str] = super().get_supported_kv_cache_layouts()
        return self.kv_memory.preferred_layouts(names)

    @_part_of_start
    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Profile as vLLM does, and return the bytes to reserve addresses for."""
        if current_platform.is_cpu():
            # vLLM would compare a fixed size with free memory. Only its warm-up is needed here.
            if self._should_warm_up_model():
                self.model_runner.warming_up_model()
            if self.parallel_config.pipeline_parallel_size > 1:
                self.model_runner.profile_run()  # allocates the tensors into which later stages receive
        else:
            with _others_may_give_back(self.init_snapshot):
                super().determine_available_memory()
        return self.kv_memory.virtual_bytes(self.get_kv_cache_spec())

    @_part_of_start
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As in vLLM, with the buffer taken from the elastic pool."""
        size_bytes = kv_cache_config.kv_cache_tensors[0].size
        allocation = _KVCacheAllocation(
            size_bytes, lambda: self.kv_memory.allocate(kv_cache_config, size_bytes)
        )
        with allocation:
            super().initialize_from_config(kv_cache_config)
        self.kv_memory.require_allocated(allocation.answered)

    @_part_of_start
    def compile_or_warm_up_model(self) -> Any:
        """As in vLLM; from then on, access to memory that no plan has mapped faults."""
        times = super().compile_or_warm_up_model()
        self.kv_memory.begin_service(getattr(self, "peak_activation_memory", 0))
        return times

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Carry out the step's memory plan, if there is one, before the step's kernels are launched."""
        plan = getattr(scheduler_output, "kvcached_plan", None)
        if plan is not None:
            self.kv_memory.apply(plan)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sleep(self, level: int = 1) -> None:
        """Give the KV cache back, then free the weights as vLLM does. Other engines may use the memory."""
        with self.kv_memory.sleep.falling_asleep(TAGS):
            if not current_platform.is_cpu():  # on the CPU vLLM only warns, and keeps the weights
                with others_may_grow():
                    super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Wait for room, then let vLLM restore its memory. After CapacityError the engine is still asleep."""
        with self.kv_memory.sleep.waking_up(tags):
            if not current_platform.is_cpu():
                super().wake_up(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        """As in vLLM (newer than 0.30), for the elastic KV cache."""
        with self.kv_memory.sleep.falling_asleep(tags):
            if not current_platform.is_cpu():
                super().discard(tags)

    def kvcached_stats(self) -> dict[str, int]:
        """Return the pool's counts; callable through vLLM's collective_rpc."""
        return self.kv_memory.stats()

    def kvcached_check(self) -> None:
        """Raise InvariantError if pool and ledger do not add up; callable through vLLM's collective_rpc."""
        self.kv_memory.check()

    def shutdown(self) -> None:
        """As in vLLM; then give all memory back."""
        try:
            super().shutdown()
        finally:
            self.kv_memory.close()
