"""Every name of SGLang that this plugin relies on, and whether the installed SGLang has it."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from kvcached_core.errors import UnsupportedError

OLDEST, NEWEST_TESTED = (0, 5, 23), (0, 5, 23)

_log = logging.getLogger(__name__)


class Seam(NamedTuple):
    """A name in SGLang. It must accept `parameters`; `kind`: function, class, attribute (of an instance)."""

    module: str
    qualname: str
    parameters: tuple[str, ...] = ()
    kind: str = "function"


_ARGS = "sglang.srt.server_args"
_HOOKS = "sglang.srt.plugins.hook_registry"
_PLATFORM = "sglang.srt.platforms.interface"
_POOLS = "sglang.srt.mem_cache.memory_pool"
_SIZES = "sglang.srt.mem_cache.kv_cache_configurator"
_ALLOCATORS = "sglang.srt.mem_cache.allocator"
_RUNNER = "sglang.srt.model_executor.model_runner"
_SCHEDULER = "sglang.srt.managers.scheduler"
_ENGINE = "sglang.srt.entrypoints.engine"
_MODEL = "sglang.srt.configs.model_config"

# What every process of SGLang has: the flag needs no more, and nothing heavy is imported for it.
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
    # Hooked beside the command line, and rebound.
    Seam(_ENGINE, "_wait_for_scheduler_ready", ("scheduler_pipe_readers", "scheduler_procs")),
    Seam(_SCHEDULER, "Scheduler.__init__", ("self", "server_args", "port_args")),
    Seam(_RUNNER, "ModelRunner.load_model", ("self",)),
    Seam(_SIZES, "KVCacheConfigurator._profile_available_bytes", ("self", "pre_model_load_memory")),
    Seam(_PLATFORM, "SRTPlatform.get_kv_pool_cls", ("self", "kind")),
    Seam(_PLATFORM, "SRTPlatform.get_paged_allocator_cls", ("self",)),
    Seam(_SIZES, "TokenToKVPoolAllocator", ("size", "dtype", "device", "kvcache", "need_sort"), "class"),
    Seam(_SIZES, "SWATokenToKVPoolAllocator", ("size", "size_swa", "page_size", "kvcache"), "class"),
    Seam(f"{_ALLOCATORS}.swa", "TokenToKVPoolAllocator", ("size", "kvcache"), "class"),
    # How a rank learns who it is and what it loads.
    Seam(_ARGS, "PortArgs.instance_id", kind="attribute"),
    Seam(_ARGS, "ServerArgs.resolved_dict", ("self",)),
    Seam("sglang.srt.runtime_context", "get_parallel"),
    Seam("sglang.srt.runtime_context", "get_device"),
    Seam(_SCHEDULER, "Scheduler.token_to_kv_pool_allocator", kind="attribute"),
    Seam(_RUNNER, "ModelRunner.model_config", kind="attribute"),
    Seam(_RUNNER, "ModelRunner.device", kind="attribute"),
    Seam(_MODEL, "ModelConfig.context_len", kind="attribute"),
    Seam(_MODEL, "ModelConfig.model_path", kind="attribute"),
    Seam(_MODEL, "ModelConfig.dtype", kind="attribute"),
    Seam(_MODEL, "ModelConfig.quantization", kind="attribute"),
    Seam(_MODEL, "ModelConfig.get_num_kv_heads", ("self", "tensor_parallel_size")),
    Seam(_SIZES, "KVCacheConfigurator.mambaish_config", kind="attribute"),
    Seam(_SIZES, "KVCacheConfigurator.kv_cache_dtype_str", kind="attribute"),
    # Kinds of KV cache that are refused by name.
    Seam(_MODEL, "is_deepseek_dsa", ("config",)),
    Seam(_MODEL, "is_deepseek_v4", ("config",)),
    Seam(_MODEL, "is_minimax_sparse", ("config",)),
    Seam("sglang.srt.layers.attention.qsa.config", "parse_qsa_profile"),
    # What pools and allocators override or call.
    Seam(_POOLS, "MHATokenToKVPool._create_buffers", ("self",)),
    Seam(_POOLS, "MHATokenToKVPool._create_buffers_normal", ("self",)),
    Seam(_POOLS, "MLATokenToKVPool._create_buffers", ("self",)),
    Seam(f"{_ALLOCATORS}.base", "BaseTokenToKVPoolAllocator.available_size", ("self",)),
    Seam(f"{_ALLOCATORS}.base", "BaseTokenToKVPoolAllocator.create_prefill_budget"),
    Seam(f"{_ALLOCATORS}.base", "BaseTokenToKVPoolAllocator.evict_to_free_tokens"),
    Seam(f"{_ALLOCATORS}.base", "BaseTokenToKVPoolAllocator.check_decode_capacity"),
    Seam(f"{_ALLOCATORS}.base", "BaseTokenToKVPoolAllocator.max_new_tokens_for_memory"),
    Seam(f"{_ALLOCATORS}.base", "BaseTokenToKVPoolAllocator.verify_byte_accounting"),
    Seam(f"{_ALLOCATORS}.paged", "PagedTokenToKVPoolAllocator.alloc_extend"),
    Seam(f"{_ALLOCATORS}.paged", "PagedTokenToKVPoolAllocator.alloc_decode"),
)  # fmt: skip

SEAMS = COMMAND_LINE + ENGINE


def sglang_version() -> str:
    """Return the version of the installed SGLang; raises UnsupportedError if there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError as error:
        raise UnsupportedError("sglang-kvcached needs SGLang, which is not installed") from error


def version_problem(text: str) -> str:
    """Say why a version of SGLang cannot be used, or return an empty text."""
    found = _numbers(text)
    if found and found < OLDEST:
        return (
            f"sglang-kvcached needs SGLang {_dotted(OLDEST)} or newer, and {text} is installed: upgrade "
            f"SGLang, or start without --kv-cache-backend kvcached and ENABLE_KVCACHED"
        )
    return ""


def missing(seam: Seam) -> str:
    """Say what is wrong with a seam in the installed SGLang, or return an empty text."""
    try:
        target: Any = importlib.import_module(seam.module)
    except ImportError as error:
        return f"{seam.module} cannot be imported: {error}"
    if seam.kind == "attribute":
        return ""  # set by __init__ or a dataclass: checked in the source by the compatibility tests
    for name in seam.qualname.split("."):
        target = getattr(target, name, None)
        if target is None:
            return f"{seam.module} has no {seam.qualname}"
    accepted = inspect.signature(target).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        return ""
    absent = [name for name in seam.parameters if name not in accepted]
    return f"{seam.module}.{seam.qualname} does not take {', '.join(absent)}" if absent else ""


def require(seams: Iterable[Seam] | None = None) -> None:
    """Raise UnsupportedError, with every difference named, unless the installed SGLang can be used."""
    installed = sglang_version()
    if problem := version_problem(installed):
        raise UnsupportedError(problem)
    problems = [problem for seam in (SEAMS if seams is None else seams) if (problem := missing(seam))]
    if problems:
        raise UnsupportedError(
            f"SGLang {installed} differs from what sglang-kvcached was made for: {'; '.join(problems)}. "
            f"Use a version from {_dotted(OLDEST)} to {_dotted(NEWEST_TESTED)}, upgrade sglang-kvcached, or "
            f"start without --kv-cache-backend kvcached and ENABLE_KVCACHED"
        )


def warn_if_newer() -> None:
    """Say so, once, where SGLang is newer than what was tested."""
    installed = sglang_version()
    if _numbers(installed) > NEWEST_TESTED:
        _log.warning(
            "SGLang %s is newer than %s, the newest sglang-kvcached was tested with; every seam it uses is "
            "there", installed, _dotted(NEWEST_TESTED),
        )  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
