"""Every name of SGLang that this plugin relies on (a seam), grouped by purpose."""

from __future__ import annotations

from kvcached_core.seams import Seam

_ARGS = "sglang.srt.server_args"
_HOOKS = "sglang.srt.plugins.hook_registry"
_PLATFORM = "sglang.srt.platforms.interface"
_POOLS = "sglang.srt.mem_cache.memory_pool"
_SIZES = "sglang.srt.mem_cache.kv_cache_configurator"
_BASE = "sglang.srt.mem_cache.allocator.base"
_TOKEN = "sglang.srt.mem_cache.allocator.token"
_PAGED = "sglang.srt.mem_cache.allocator.paged"
_SWA = "sglang.srt.mem_cache.allocator.swa"
_BUDGET = "sglang.srt.mem_cache.prefill_budget"
_TREE = "sglang.srt.mem_cache.base_prefix_cache"
_RUNNER = "sglang.srt.model_executor.model_runner"
_SCHEDULER = "sglang.srt.managers.scheduler"
_ENGINE = "sglang.srt.entrypoints.engine"
_MODEL = "sglang.srt.configs.model_config"
_CHECK = ("self", "extend_input_len", "total_tokens", "max_new_tokens", "input_tokens",
          "swa_host_hit_length", "chunk_limit", "auxiliary_swa_host_hit_length")  # fmt: skip

# Names for the flag, checked in every process of SGLang; they import nothing heavy.
COMMAND_LINE: tuple[Seam, ...] = (
    Seam(_HOOKS, "HookRegistry.register", ("target", "hook", "hook_type", "source")),
    Seam(_HOOKS, "HookRegistry.apply_hooks"),
    Seam(_HOOKS, "HookSource", ("plugin_name", "dist_name"), "class"),
    Seam(_HOOKS, "HookType.AFTER", kind="attribute"),
    Seam(_HOOKS, "HookType.AROUND", kind="attribute"),
    Seam(_ARGS, "ServerArgs.add_cli_args", ("parser",)),
    Seam(_ARGS, "ServerArgs.from_cli_args", ("args",)),
)

ENGINE: tuple[Seam, ...] = (
    # Functions that are hooked besides the command line, and allocator names that are rebound.
    Seam(_ENGINE, "_wait_for_scheduler_ready", ("scheduler_pipe_readers", "scheduler_procs")),
    Seam(_SCHEDULER, "Scheduler.__init__", ("self", "server_args", "port_args")),
    Seam(_RUNNER, "ModelRunner.load_model", ("self",)),
    Seam(_SIZES, "KVCacheConfigurator._profile_available_bytes", ("self", "pre_model_load_memory")),
    Seam(_PLATFORM, "SRTPlatform.get_kv_pool_cls", ("self", "kind")),
    Seam(_PLATFORM, "SRTPlatform.get_paged_allocator_cls", ("self",)),
    Seam(_SIZES, "TokenToKVPoolAllocator", ("size", "dtype", "device", "kvcache", "need_sort"), "class"),
    Seam(_SIZES, "SWATokenToKVPoolAllocator", ("size", "size_swa", "page_size", "kvcache"), "class"),
    Seam(_SWA, "TokenToKVPoolAllocator", ("size", "kvcache"), "class"),
    # Read for a rank's identity and for the model that it loads.
    Seam(_ARGS, "PortArgs.instance_id", kind="attribute"),
    Seam(_ARGS, "ServerArgs.resolved_dict", ("self",)),
    Seam("sglang.srt.runtime_context", "get_parallel"),
    Seam("sglang.srt.runtime_context", "get_device"),
    Seam(_RUNNER, "ModelRunner.model_config", kind="attribute"),
    Seam(_RUNNER, "ModelRunner.device", kind="attribute"),
    Seam(_MODEL, "ModelConfig.context_len", kind="attribute"),
    Seam(_MODEL, "ModelConfig.model_path", kind="attribute"),
    Seam(_MODEL, "ModelConfig.dtype", kind="attribute"),
    Seam(_MODEL, "ModelConfig.quantization", kind="attribute"),
    Seam(_MODEL, "ModelConfig.get_num_kv_heads", ("self", "tensor_parallel_size")),
    Seam(_SIZES, "KVCacheConfigurator.mambaish_config", kind="attribute"),
    Seam(_SIZES, "KVCacheConfigurator.kv_cache_dtype_str", kind="attribute"),
    Seam("sglang.srt.runtime_context", "attention_backends"),
    Seam("sglang.srt.utils.common", "cpu_has_amx_support"),
    # Kinds of KV cache that are refused by name.
    Seam(_MODEL, "is_deepseek_dsa", ("config",)),
    Seam(_MODEL, "is_deepseek_v4", ("config",)),
    Seam(_MODEL, "is_minimax_sparse", ("config",)),
    Seam("sglang.srt.layers.attention.qsa.config", "parse_qsa_profile"),
)  # fmt: skip

# Names that this plugin's pools, allocators and prefill budgets override.
MEMORY: tuple[Seam, ...] = (
    Seam(_POOLS, "MHATokenToKVPool._create_buffers", ("self",)),
    Seam(_POOLS, "MHATokenToKVPool._create_buffers_normal", ("self",)),
    Seam(_POOLS, "MHATokenToKVPool._slot_move_pointer_buffers", ("self",)),
    Seam(_POOLS, "MLATokenToKVPool._create_buffers", ("self",)),
    Seam(_POOLS, "KVCache._finalize_allocation_log", ("self", "num_tokens")),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.create_prefill_budget", ("self", "tree_cache",
         "num_mixed_decode_tokens")),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.evict_to_free_tokens", ("self", "tree_cache", "num_tokens")),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.check_decode_capacity", ("self", "num_tokens", "tree_cache",
         "requests", "spec_algorithm")),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.max_new_tokens_for_memory", ("self", "input_tokens",
         "max_new_tokens", "token_capacity", "sliding_window_size", "chunk_size")),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.verify_byte_accounting", ("self",)),
    Seam(_BASE, "BaseTokenToKVPoolAllocator.get_all_free_pages", ("self",)),
    Seam(_TOKEN, "TokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(_TOKEN, "TokenToKVPoolAllocator.free", ("self", "free_index")),
    Seam(_TOKEN, "TokenToKVPoolAllocator.clear", ("self",)),
    Seam(_TOKEN, "TokenToKVPoolAllocator.available_size", ("self",)),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc_extend", ("self", "prefix_lens", "prefix_lens_cpu",
         "seq_lens", "seq_lens_cpu", "last_loc", "extend_num_tokens", "num_new_pages")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.alloc_decode", ("self", "seq_lens", "seq_lens_cpu",
         "last_loc")),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator._release_page_ids", ("self",)),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.clear", ("self",)),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.available_size", ("self",)),
    Seam(_PAGED, "PagedTokenToKVPoolAllocator.get_all_free_pages", ("self",)),
    Seam(_SWA, "SWATokenToKVPoolAllocator.__init__", ("self", "size", "size_swa", "page_size", "dtype",
         "device", "kvcache", "need_sort", "req_to_token_pool")),
    Seam(_SWA, "SWATokenToKVPoolAllocator.alloc", ("self", "need_size")),
    Seam(_SWA, "SWATokenToKVPoolAllocator.new_pages_available", ("self", "num_full_pages", "num_swa_pages")),
    Seam(_SWA, "SWATokenToKVPoolAllocator.alloc_decode", ("self", "seq_lens", "seq_lens_cpu", "last_loc")),
    Seam(_SWA, "SWATokenToKVPoolAllocator.clear", ("self",)),
    Seam(_SWA, "SWATokenToKVPoolAllocator.get_kvcache", ("self",)),
    Seam(_SWA, "SWATokenToKVPoolAllocator.create_prefill_budget", ("self", "tree_cache",
         "num_mixed_decode_tokens")),
    Seam(_SWA, "SWATokenToKVPoolAllocator.evict_to_free_tokens", ("self", "tree_cache", "num_tokens")),
    Seam(_BUDGET, "PrefillBudget.__init__", ("self", "allocator", "tree_cache", "num_mixed_decode_tokens")),
    Seam(_BUDGET, "PrefillBudget.remaining_total", kind="attribute"),
    Seam(_BUDGET, "PrefillBudget.remaining_current", kind="attribute"),
    Seam(_BUDGET, "PrefillBudget.has_capacity", ("self",)),
    Seam(_BUDGET, "PrefillBudget.check_prefill", _CHECK),
    Seam(_BUDGET, "PrefillBudget.can_allocate_prefill", ("self", "paged_input", "extend_input_len",
         "max_new_tokens", "chunk_limit")),
    Seam(_BUDGET, "PrefillBudget.available_chunk_tokens", ("self", "chunk_limit")),
    Seam(_BUDGET, "PrefillBudget.fit_chunk", ("self", "extend_input_len", "max_new_tokens", "chunk_limit")),
    Seam(_BUDGET, "SWAPrefillBudget.__init__", ("self", "all_swa")),
    Seam(_BUDGET, "SWAPrefillBudget.remaining_swa", kind="attribute"),
    Seam(_BUDGET, "SWAPrefillBudget.has_capacity", ("self",)),
    Seam(_BUDGET, "SWAPrefillBudget.check_prefill", _CHECK),
    Seam(_BUDGET, "SWAPrefillBudget.can_allocate_prefill", ("self", "paged_input", "extend_input_len",
         "max_new_tokens", "chunk_limit")),
    Seam(_BUDGET, "SWAPrefillBudget.available_chunk_tokens", ("self", "chunk_limit")),
    Seam(_BUDGET, "SWAPrefillBudget.fit_chunk", ("self", "extend_input_len", "max_new_tokens",
         "chunk_limit")),
)  # fmt: skip

# Names of a scheduler, its prefix cache and its sleep that this plugin reads or calls.
SCHEDULER: tuple[Seam, ...] = (
    *(
        Seam(_SCHEDULER, f"Scheduler.{name}", kind="attribute")
        for name in (
            "waiting_queue", "running_batch", "last_batch", "chunked_req", "tree_cache", "page_size",
            "max_running_requests", "max_prefill_tokens", "chunked_prefill_size", "idle_sleeper", "device",
            "forward_stream", "copy_stream", "server_args", "token_to_kv_pool_allocator",
            "new_token_ratio_tracker",
        )
    ),
    Seam("sglang.srt.managers.scheduler_components.idle_sleeper", "IdleSleeper.poller", kind="attribute"),
    Seam("sglang.srt.managers.scheduler_components.new_token_ratio_tracker", "NewTokenRatioTracker.current",
         kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "ScheduleBatch.batch_is_full", kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "ScheduleBatch.reqs", kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "ScheduleBatch.forward_mode", kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "Req.origin_input_ids", kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "Req.output_ids", kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "Req.sampling_params", kind="attribute"),
    Seam("sglang.srt.sampling.sampling_params", "SamplingParams.max_new_tokens", kind="attribute"),
    Seam("sglang.srt.sampling.sampling_params", "SamplingParams.ignore_eos", kind="attribute"),
    Seam("sglang.srt.managers.schedule_batch", "Req.full_untruncated_fill_ids", kind="attribute"),
    Seam(_TREE, "EvictParams", ("num_tokens", "swa_num_tokens"), "class"),
    Seam(_TREE, "EvictResult", ("num_tokens_evicted", "swa_num_tokens_evicted"), "class"),
    Seam(_TREE, "BasePrefixCache.evict", ("self", "params")),
    *(
        Seam(_TREE, f"BasePrefixCache.{name}", ("self",))
        for name in (
            "evictable_size", "full_evictable_size", "swa_evictable_size", "supports_swa", "supports_mamba",
            "supports_prefix_sharing",
        )
    ),
    Seam("sglang.srt.utils.common", "get_num_new_pages", ("seq_lens", "page_size", "prefix_lens", "decode")),
)  # fmt: skip

SEAMS = COMMAND_LINE + ENGINE + MEMORY + SCHEDULER
