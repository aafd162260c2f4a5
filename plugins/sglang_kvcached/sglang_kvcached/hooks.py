"""What is hooked in SGLang, through its own HookRegistry: eight functions, each only where it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from kvcached_core import config
from kvcached_core.errors import KVCachedError
from sglang_kvcached import flag, seams

_ENGINE, _SCHEDULER = "sglang.srt.entrypoints.engine", "sglang.srt.managers.scheduler"
_RUNNER = "sglang.srt.model_executor.model_runner"
_SIZES = "sglang.srt.mem_cache.kv_cache_configurator"
_PLATFORM = "sglang.srt.platforms.interface"
_registered: set[str] = set()


def register() -> None:
    """Register what this process needs; nothing at all where SGLang is not as it should be."""
    try:
        chosen = config.enabled(os.environ)
        seams.require(seams.COMMAND_LINE)
        if chosen and (_SCHEDULER in sys.modules or _ENGINE in sys.modules):
            config.load({}, os.environ)
            seams.require()
    except KVCachedError as error:
        if os.environ.get(config.SWITCH_VARIABLE):
            # An exception would be logged and forgotten, and the engine would be stock in silence.
            raise SystemExit(f"sglang-kvcached: {error}") from error
        print(f"sglang-kvcached is not active: {error}", file=sys.stderr)
        return
    _hook("sglang.srt.server_args.ServerArgs.add_cli_args", "AFTER", flag.add_flag)
    _hook("sglang.srt.server_args.ServerArgs.from_cli_args", "AROUND", flag.read_flag)
    if chosen and _ENGINE in sys.modules:
        _hook(f"{_ENGINE}._wait_for_scheduler_ready", "AFTER", _require_elastic)
    if chosen and _SCHEDULER in sys.modules:
        _hook(f"{_SCHEDULER}.Scheduler.__init__", "AROUND", _serve)
        _hook(f"{_RUNNER}.ModelRunner.load_model", "AROUND", _load)
        _hook(f"{_SIZES}.KVCacheConfigurator._profile_available_bytes", "AROUND", _virtual_bytes)
        _hook(f"{_PLATFORM}.SRTPlatform.get_kv_pool_cls", "AROUND", _pool_class)
        _hook(f"{_PLATFORM}.SRTPlatform.get_paged_allocator_cls", "AROUND", _allocator_class)


def watch_schedulers() -> None:
    """Have the parent look after its schedulers: the choice was made after the plugins were loaded."""
    import sglang.srt.entrypoints.engine  # noqa: F401  (the registry would import it just the same)
    from sglang.srt.plugins.hook_registry import HookRegistry

    _hook(f"{_ENGINE}._wait_for_scheduler_ready", "AFTER", _require_elastic)
    HookRegistry.apply_hooks()


def _hook(target: str, kind: str, hook: Callable[..., Any]) -> None:
    """Register once in a process, however often the plugin is loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    if target not in _registered:
        _registered.add(target)
        source = HookSource("kvcached", "sglang-kvcached")
        HookRegistry.register(target, hook, HookType[kind], source=source)


def _require_elastic(result: list[dict[str, Any]], *_: Any, **__: Any) -> None:
    """Once all schedulers of this parent are ready: they are elastic, or the server stops."""
    if config.enabled(os.environ):
        from sglang_kvcached import startup_check

        startup_check.require_elastic(len(result))


def _serve(
    original: Callable[..., None], scheduler: Any, server_args: Any, port_args: Any, *args: Any, **kwargs: Any
) -> None:
    """A scheduler's life begins here and, if it cannot be elastic, ends here."""
    from sglang_kvcached import starting

    with starting.rank(server_args, port_args):
        original(scheduler, server_args, port_args, *args, **kwargs)
        starting.require_elastic(scheduler)


def _load(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Wait for this engine's turn before anything is loaded; a draft's weights are part of it."""
    from sglang_kvcached import starting

    if not runner.is_draft_worker:
        starting.current().wait_for_room(runner)
    return original(runner, *args, **kwargs)


def _virtual_bytes(
    original: Callable[..., int], configurator: Any, pre_model_load_memory: Any, *args: Any, **kwargs: Any
) -> int:
    """Answer how much there is for the KV cache: addresses, not what happens to be free now."""
    from sglang_kvcached import starting, support

    support.refuse_model(configurator)
    start = starting.current()
    if configurator.mambaish_config is not None:
        # The states of linear attention are sized here as well; they are not elastic, so from what is free.
        return start.note_virtual(original(configurator, pre_model_load_memory, *args, **kwargs))
    return start.note_virtual(start.virtual_bytes())


def _pool_class(original: Callable[..., type | None], platform: Any, *, kind: Any) -> type | None:
    """Name the elastic pool of a kind; None leaves SGLang's own, which no elastic allocator takes."""
    from sglang_kvcached import process_state, support

    support.refuse_platform(original(platform, kind=kind), f"KV pool for {kind}")
    process_state.rebind()
    return process_state.pool_class(kind)


def _allocator_class(original: Callable[..., type | None], platform: Any) -> type:
    """Name the elastic allocator of pages."""
    from sglang_kvcached import process_state, support

    support.refuse_platform(original(platform), "paged allocator")
    return process_state.paged_allocator_class()
