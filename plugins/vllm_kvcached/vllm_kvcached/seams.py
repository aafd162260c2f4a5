"""Every name of vLLM that this plugin uses (a seam), and a check that the installed vLLM has it."""

from __future__ import annotations

import logging

from kvcached_core.errors import UnsupportedError
from kvcached_core.seams import Seam, VersionGate, missing

__all__ = ["SEAMS", "Seam", "missing", "require"]

VERSIONS = VersionGate("vllm-kvcached", "vLLM", oldest=(0, 30), newest_tested=(0, 33))

_log = logging.getLogger(__name__)


_QUEUE = "vllm.v1.core.kv_cache_utils"
_POOL = "vllm.v1.core.block_pool"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_GPU = "vllm.v1.worker.gpu_worker"
_CPU = "vllm.v1.worker.cpu_worker"
_ENGINE = "vllm.v1.engine"
_MODEL = "vllm.config.model"
_PARALLEL = "vllm.config.parallel"
_NVML = "vllm.third_party.pynvml"

SEAMS: tuple[Seam, ...] = (
    # The two functions that are wrapped.
    Seam("vllm.engine.arg_utils", "EngineArgs.add_cli_args", ("parser",)),
    Seam(f"{_ENGINE}.core", "EngineCoreProc._process_input_queue", ("self",)),
    # How the chosen backend and its settings reach the engine.
    Seam("vllm.engine.arg_utils", "EngineArgs.worker_cls", kind="attribute"),
    Seam("vllm.engine.arg_utils", "EngineArgs.scheduler_cls", kind="attribute"),
    Seam("vllm.config.vllm", "VllmConfig.additional_config", kind="attribute"),
    Seam("vllm.config.vllm", "VllmConfig.instance_id", kind="attribute"),
    Seam("vllm.config.cache", "CacheConfig.kv_cache_memory_bytes", kind="attribute"),
    Seam("vllm.config.cache", "CacheConfig.gpu_memory_utilization", kind="attribute"),
    # Read to estimate the memory that an engine claims before it loads.
    Seam(_MODEL, "ModelConfig.get_num_layers", ("self", "parallel_config")),
    Seam(_MODEL, "ModelConfig.get_num_kv_heads", ("self", "parallel_config")),
    Seam(_MODEL, "ModelConfig.get_head_size", ("self",)),
    Seam(_MODEL, "ModelConfig.use_mla", kind="attribute"),
    Seam(_MODEL, "ModelConfig.sleep_mode_backend", kind="attribute"),
    Seam(_MODEL, "ModelConfig.original_max_model_len", kind="attribute"),
    Seam("vllm.utils.torch_utils", "kv_cache_dtype_str_to_dtype", ("kv_cache_dtype", "model_config")),
    Seam("vllm.platforms.interface", "Platform.get_device_uuid", ("device_id",)),
    Seam(_NVML, "nvmlInit"),
    Seam(_NVML, "nvmlDeviceGetHandleByUUID", ("uuid",)),
    Seam(_NVML, "nvmlDeviceGetMemoryInfo", ("handle",)),
    Seam(_NVML, "nvmlDeviceGetComputeRunningProcesses", ("handle",)),
    # The free queue: this plugin replaces all its methods, so every one is listed.
    Seam(_QUEUE, "FreeKVCacheBlockQueue.__init__", ("self", "blocks")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.popleft", ("self",)),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.popleft_n", ("self", "n")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.remove", ("self", "block")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.append", ("self", "block")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.append_n", ("self", "blocks")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.prepend_n", ("self", "blocks")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.get_all_free_blocks", ("self",)),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.iter_blocks_after", ("self", "cursor")),
    Seam(_QUEUE, "FreeKVCacheBlockQueue.num_free_blocks", kind="attribute"),
    Seam(_QUEUE, "KVCacheBlock.block_id", kind="attribute"),
    Seam(_QUEUE, "KVCacheBlock.block_hash", kind="attribute"),
    Seam(_QUEUE, "KVCacheBlock.ref_cnt", kind="attribute"),
    Seam(_QUEUE, "KVCacheBlock.prev_free_block", kind="attribute"),
    Seam(_QUEUE, "KVCacheBlock.next_free_block", kind="attribute"),
    Seam(_POOL, "BlockPool.free_block_queue", kind="attribute"),
    Seam(_POOL, "BlockPool.num_gpu_blocks", kind="attribute"),
    Seam(_POOL, "BlockPool.blocks", kind="attribute"),
    Seam(_POOL, "BlockPool._maybe_evict_cached_block", ("self", "block")),
    Seam(_POOL, "BlockPool._notify_reuse", ("self", "blocks")),
    Seam("vllm.v1.core.kv_cache_manager", "KVCacheManager.block_pool", kind="attribute"),
    Seam("vllm.v1.core.kv_cache_manager", "KVCacheManager.watermark_blocks", kind="attribute"),
    # The scheduler.
    Seam(_SCHEDULER, "Scheduler.schedule", ("self", "throttle_prefills")),
    Seam(_SCHEDULER, "Scheduler.has_requests", ("self",)),
    Seam(_SCHEDULER, "Scheduler.has_unfinished_requests", ("self",)),
    Seam(_SCHEDULER, "Scheduler.update_from_output", ("self", "scheduler_output", "model_runner_output")),
    Seam(_SCHEDULER, "Scheduler.reset_prefix_cache", ("self",)),
    Seam(_SCHEDULER, "Scheduler.make_stats", ("self",)),
    Seam(_SCHEDULER, "Scheduler.shutdown", ("self",)),
    Seam(_SCHEDULER, "Scheduler.get_kv_cache_usage", ("self",)),
    Seam(_SCHEDULER, "Scheduler.finish_requests", ("self", "request_ids", "finished_status")),
    # Preemption: vLLM delivers steps in flight before it resumes a request, so outputs stay the same.
    Seam(_SCHEDULER, "Scheduler._preempt_request", ("self", "request", "timestamp")),
    Seam(_SCHEDULER, "Scheduler._pause_state", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.policy", kind="attribute"),
    Seam("vllm.v1.core.sched.interface", "PauseState.PAUSED_NEW", kind="attribute"),
    Seam("vllm.v1.core.sched.request_queue", "SchedulingPolicy.PRIORITY", kind="attribute"),
    Seam("vllm.v1.request", "Request.num_stale_output_tokens", kind="attribute"),
    Seam("vllm.v1.request", "Request.priority", kind="attribute"),
    Seam("vllm.v1.request", "Request.arrival_time", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.running", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.waiting", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.kv_cache_manager", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.num_lookahead_tokens", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.max_num_scheduled_tokens", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.max_num_running_reqs", kind="attribute"),
    Seam(_SCHEDULER, "Scheduler.max_model_len", kind="attribute"),
    Seam("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", kind="class"),
    Seam("vllm.v1.core.sched.output", "SchedulerOutput.total_num_scheduled_tokens", kind="attribute"),
    Seam("vllm.v1.core.sched.output", "SchedulerOutput.preempted_req_ids", kind="attribute"),
    Seam("vllm.v1.metrics.stats", "SchedulerStats.kv_cache_usage", kind="attribute"),
    Seam("vllm.v1.request", "Request.num_tokens", kind="attribute"),
    Seam("vllm.v1.request", "Request.client_index", kind="attribute"),
    Seam("vllm.v1.request", "RequestStatus.FINISHED_ERROR", kind="attribute"),
    Seam(_ENGINE, "EngineCoreOutput.finish_reason", kind="attribute"),
    Seam(_ENGINE, "EngineCoreOutputs.outputs", kind="attribute"),
    Seam(_ENGINE, "EngineCoreRequestType.WAKEUP", kind="attribute"),
    Seam(f"{_ENGINE}.core", "EngineCoreProc.input_queue", kind="attribute"),
    # The workers.
    Seam(_GPU, "Worker.init_device", ("self",)),
    Seam(_GPU, "Worker.load_model", ("self",)),
    Seam(_GPU, "Worker.determine_available_memory", ("self",)),
    Seam(_GPU, "Worker.initialize_from_config", ("self", "kv_cache_config")),
    Seam(_GPU, "Worker.compile_or_warm_up_model", ("self",)),
    Seam(_GPU, "Worker.execute_model", ("self", "scheduler_output")),
    Seam(_GPU, "Worker.sleep", ("self", "level")),
    Seam(_GPU, "Worker.wake_up", ("self", "tags")),
    Seam("vllm.device_allocator", "get_mem_allocator_instance"),
    Seam("vllm.device_allocator", "AllocationData.handle", kind="attribute"),
    Seam("vllm.device_allocator", "AllocationData.is_asleep", kind="attribute"),
    Seam("vllm.device_allocator.cumem", "CuMemAllocator.pointer_to_data", kind="attribute"),
    Seam(_GPU, "Worker.get_kv_cache_spec", ("self",)),
    Seam(_GPU, "Worker.get_supported_kv_cache_layouts", ("self",)),
    Seam(_GPU, "Worker.shutdown", ("self",)),
    Seam(_GPU, "Worker.init_snapshot", kind="attribute"),
    Seam(_GPU, "Worker.requested_memory", kind="attribute"),
    Seam(_CPU, "CPUWorker._should_warm_up_model", ("self",)),
    Seam("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.warming_up_model", ("self",)),
    Seam("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.profile_run", ("self",)),
    Seam("vllm.v1.worker.utils", "allocate_kv_cache", ("kv_cache_config", "device", "layout")),
    Seam("vllm.v1.kv_cache_interface", "KVCacheTensor.size", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheTensor.layers", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheTensor.layer_stride", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheTensor.block_stride", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheTensor.offset", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheConfig.num_blocks", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheConfig.kv_cache_tensors", kind="attribute"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheConfig.kv_cache_groups", kind="attribute"),
    Seam("vllm.distributed.parallel_state", "get_world_group"),
    # Several nodes.
    Seam(_PARALLEL, "ParallelConfig.nnodes", kind="attribute"),
    Seam(_PARALLEL, "ParallelConfig.nnodes_within_dp", kind="attribute"),
    Seam(_PARALLEL, "ParallelConfig.node_rank_within_dp", kind="attribute"),
    Seam(_PARALLEL, "ParallelConfig.local_world_size", kind="attribute"),
    Seam(_PARALLEL, "ParallelConfig.master_addr", kind="attribute"),
    Seam(_PARALLEL, "ParallelConfig.master_port", kind="attribute"),
    Seam(_PARALLEL, "ParallelConfig.data_parallel_size", kind="attribute"),
)


def vllm_version() -> str:
    """Return the version of the installed vLLM; raises UnsupportedError if there is none."""
    try:
        import vllm
    except ImportError as error:
        raise UnsupportedError(f"vllm-kvcached needs vLLM, which cannot be imported: {error}") from error
    return str(vllm.__version__)


def require(cpu: bool = False) -> None:
    """Raise UnsupportedError unless the installed vLLM can be used; warn if it is newer than the tested ones.

    `cpu` checks the CPU worker instead of the GPU worker: each can be imported on its own platform only.
    """
    version = vllm_version()
    if problem := VERSIONS.problem(version):
        raise UnsupportedError(problem)
    if not VERSIONS.is_newer(version):
        return
    other_platform = (_GPU,) if cpu else (_CPU, "vllm.v1.worker.cpu_model_runner")
    problems = [missing(seam) for seam in SEAMS if seam.module not in other_platform]
    if any(problems):
        raise UnsupportedError(
            f"vLLM {version} is newer than vllm-kvcached was tested with, and differs where it matters: "
            f"{'; '.join(filter(None, problems))}. Upgrade vllm-kvcached, or start without it"
        )
    VERSIONS.warn_if_newer(version, _log)
