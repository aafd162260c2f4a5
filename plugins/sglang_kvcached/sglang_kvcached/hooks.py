"""The functions of SGLang that this plugin hooks, through SGLang's own HookRegistry.

Eight functions are hooked, each only in the processes that need it. Two modules of SGLang name their
allocators without asking the platform; `rebind_allocators` replaces those names.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from kvcached_core import config
from kvcached_core.errors import KVCachedError, UnsupportedError
from sglang_kvcached import flag, seams, support

_ENGINE, _SCHEDULER = "sglang.srt.entrypoints.engine", "sglang.srt.managers.scheduler"
_RUNNER = "sglang.srt.model_executor.model_runner"
_SIZES = "sglang.srt.mem_cache.kv_cache_configurator"
_PLATFORM = "sglang.srt.platforms.interface"
_REBOUND_MODULES = (_SIZES, "sglang.srt.mem_cache.allocator.swa")
_registered: set[str] = set()


def register() -> None:
    """Register the hooks of this process; none if SGLang lacks a seam and kvcached was not asked for.

    Ends the process with one sentence if kvcached was asked for and cannot be used.
    """
    try:
        chosen = config.enabled(os.environ)
        seams.require(seams.COMMAND_LINE)
        if chosen and (_SCHEDULER in sys.modules or _ENGINE in sys.modules):
            config.load({}, os.environ)
            seams.require()
    except KVCachedError as error:
        if os.environ.get(config.SWITCH_VARIABLE):
            # SGLang would log an exception and go on, and the engine would silently be stock.
            raise SystemExit(f"sglang-kvcached: {error}") from error
        print(f"sglang-kvcached is not active: {error}", file=sys.stderr)
        return
    _hook("sglang.srt.server_args.ServerArgs.add_cli_args", "AFTER", flag.add_flag)
    _hook("sglang.srt.server_args.ServerArgs.from_cli_args", "AROUND", _read_flag)
    if chosen and _ENGINE in sys.modules:
        _hook(f"{_ENGINE}._wait_for_scheduler_ready", "AFTER", _require_elastic_ranks)
    if chosen and _SCHEDULER in sys.modules:
        _hook(f"{_SCHEDULER}.Scheduler.__init__", "AROUND", _start_scheduler)
        _hook(f"{_RUNNER}.ModelRunner.load_model", "AROUND", _load_model)
        _hook(f"{_SIZES}.KVCacheConfigurator._profile_available_bytes", "AROUND", _virtual_bytes)
        _hook(f"{_PLATFORM}.SRTPlatform.get_kv_pool_cls", "AROUND", _pool_class)
        _hook(f"{_PLATFORM}.SRTPlatform.get_paged_allocator_cls", "AROUND", _allocator_class)


def _hook(target: str, kind: str, hook: Callable[..., Any]) -> None:
    """Register a hook, only once in a process even if SGLang loads the plugin several times."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    if target not in _registered:
        _registered.add(target)
        source = HookSource("kvcached", "sglang-kvcached")
        HookRegistry.register(target, hook, HookType[kind], source=source)


def _read_flag(original: Callable[..., Any], owner: type, args: argparse.Namespace) -> Any:
    """Read `--kv-cache-backend` from the command line."""
    return flag.read_flag(original, owner, args, _prepare)


def _prepare() -> None:
    """Check settings and seams, and hook the parent's check of its schedulers.

    SGLang loaded the plugins before it read the flag, so this hook is applied now. Raises ConfigError or
    UnsupportedError.
    """
    support.settings()
    seams.require()
    seams.warn_if_newer()

    import sglang.srt.entrypoints.engine  # noqa: F401  (the registry would import it as well)
    from sglang.srt.plugins.hook_registry import HookRegistry

    _hook(f"{_ENGINE}._wait_for_scheduler_ready", "AFTER", _require_elastic_ranks)
    HookRegistry.apply_hooks()


def _require_elastic_ranks(result: list[dict[str, Any]], *_: Any, **__: Any) -> None:
    """Stop the server unless all schedulers of this parent, which are ready now, are elastic."""
    if config.enabled(os.environ):
        from sglang_kvcached import startup_check

        startup_check.require_elastic_ranks(len(result))


def _start_scheduler(
    original: Callable[..., None], scheduler: Any, server_args: Any, port_args: Any, *args: Any, **kwargs: Any
) -> None:
    """Start a rank around SGLang's scheduler; raises if the scheduler cannot be elastic."""
    from sglang_kvcached import starting

    with starting.rank(server_args, port_args):
        original(scheduler, server_args, port_args, *args, **kwargs)
        starting.finish(scheduler)


def _load_model(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wait for this engine's turn before the target model is loaded; its turn covers a draft model."""
    from sglang_kvcached import starting

    if not runner.is_draft_worker:
        starting.current().wait_for_room(runner)
    return original(runner, *args, **kwargs)


def _virtual_bytes(
    original: Callable[..., int], configurator: Any, pre_model_load_memory: Any, *args: Any, **kwargs: Any
) -> int:
    """Return the bytes of addresses to reserve for the KV cache, which do not depend on free memory."""
    from sglang_kvcached import starting

    support.refuse_model(configurator)
    start = starting.current()
    if configurator.mambaish_config is not None:
        # SGLang sizes the states of linear attention here too. They are not elastic: use free memory.
        return start.note_virtual_bytes(original(configurator, pre_model_load_memory, *args, **kwargs))
    return start.note_virtual_bytes(start.virtual_bytes())


def _pool_class(original: Callable[..., type | None], platform: Any, *, kind: Any) -> type | None:
    """Return the elastic class for a kind of pool.

    None keeps SGLang's own pool, which the elastic allocators refuse.
    """
    support.refuse_platform(original(platform, kind=kind), f"KV pool for {kind}")
    rebind_allocators()
    from sglang_kvcached import pools

    return {"mha": pools.ElasticMHATokenToKVPool, "mla": pools.ElasticMLATokenToKVPool}.get(str(kind))


def _allocator_class(original: Callable[..., type | None], platform: Any) -> type:
    """Return the elastic allocator for pages of more than one slot."""
    support.refuse_platform(original(platform), "paged allocator")
    from sglang_kvcached import allocators

    return allocators.ElasticPagedAllocator


def rebind_allocators() -> None:
    """Replace the allocator names in the modules that build allocators. A second call changes nothing."""
    from sglang_kvcached.allocators import ElasticTokenAllocator
    from sglang_kvcached.swa import ElasticSWAAllocator

    replacements = {
        "TokenToKVPoolAllocator": ElasticTokenAllocator,
        "SWATokenToKVPoolAllocator": ElasticSWAAllocator,
        "PureSWATokenToKVPoolAllocator": _refuse_pure_swa,
    }
    for module_name in _REBOUND_MODULES:
        module = importlib.import_module(module_name)
        for name, replacement in replacements.items():
            # A class that the module defines itself stays: the elastic one is derived from it.
            if getattr(getattr(module, name, None), "__module__", module_name) != module_name:
                setattr(module, name, replacement)


def _refuse_pure_swa(*_: Any, **__: Any) -> None:
    raise UnsupportedError("kvcached: models with a sliding window in every layer are not supported")
