"""The functions that are hooked in SGLang, and the effect of each hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kvcached_core.errors import InvariantError, UnsupportedError
from sglang_kvcached import hooks, starting, startup_check, support

COMMAND_LINE = {
    "sglang.srt.server_args.ServerArgs.add_cli_args",
    "sglang.srt.server_args.ServerArgs.from_cli_args",
}
ENGINE = {
    "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
    "sglang.srt.managers.scheduler.Scheduler.__init__",
    "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
    "sglang.srt.platforms.interface.SRTPlatform.get_kv_pool_cls",
    "sglang.srt.platforms.interface.SRTPlatform.get_paged_allocator_cls",
}
REBOUND = {
    "sglang.srt.mem_cache.kv_cache_configurator.TokenToKVPoolAllocator",
    "sglang.srt.mem_cache.kv_cache_configurator.SWATokenToKVPoolAllocator",
    "sglang.srt.mem_cache.kv_cache_configurator.PureSWATokenToKVPoolAllocator",  # refused
    "sglang.srt.mem_cache.allocator.swa.TokenToKVPoolAllocator",
}
# SGLang sets this when it loads plugins.
OWN = {"sglang.srt.plugins._plugins_loaded"}


def test_a_scheduler_process_differs_from_stock_in_these_names_only() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SGLANG_USE_CPU_ENGINE": "1"}
    environ.pop("ENABLE_KVCACHED", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang.classes"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert set(seen["without"]) - OWN == COMMAND_LINE
    assert set(seen["with"]) - OWN == COMMAND_LINE | ENGINE | REBOUND


class Platform:
    """A platform without classes of its own."""


def nothing(*_: Any, **__: Any) -> None:
    """Return None: the platform supplies no class."""


@pytest.fixture
def rebound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the late rebinds instead of doing them in this process."""
    done: list[str] = []
    monkeypatch.setattr(hooks, "rebind_allocators", lambda: done.append("rebound"))
    return done


def test_the_pool_hook_returns_elastic_classes_and_rebinds_the_allocators(rebound: list[str]) -> None:
    named = {kind: hooks._pool_class(nothing, Platform(), kind=kind) for kind in ("mha", "mla", "dsa")}
    assert [cls and cls.__module__.partition(".")[0] for cls in named.values()] == ["sglang_kvcached"] * 2 + [
        None
    ]
    assert rebound == ["rebound"] * 3
    assert hooks._allocator_class(nothing, Platform()).__module__.startswith("sglang_kvcached.")


def test_a_platform_with_classes_of_its_own_is_refused(rebound: list[str]) -> None:
    with pytest.raises(UnsupportedError, match="has a KV pool for mha of its own"):
        hooks._pool_class(lambda *_, **__: dict, Platform(), kind="mha")
    with pytest.raises(UnsupportedError, match="has a paged allocator of its own"):
        hooks._allocator_class(lambda *_: dict, Platform())
    assert rebound == []


class Start:
    """A start that records its calls."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def wait_for_room(self, runner: Any) -> None:
        self.asked.append(runner)

    def virtual_bytes(self) -> int:
        return 1000

    def note_virtual_bytes(self, size_bytes: int) -> int:
        self.asked.append(size_bytes)
        return size_bytes


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Make a start the current one."""
    made = Start()
    monkeypatch.setattr(starting, "_current", made)
    return made


def test_an_engine_waits_for_its_turn_before_the_target_model_and_not_again_for_the_draft(
    start: Start,
) -> None:
    target, draft = SimpleNamespace(is_draft_worker=False), SimpleNamespace(is_draft_worker=True)
    loaded: list[Any] = []

    def load(runner: Any) -> None:
        assert start.asked == [target]
        loaded.append(runner)

    hooks._load_model(load, target)
    hooks._load_model(load, draft)
    assert loaded == [target, draft]


def test_addresses_are_sized_by_the_device_and_not_by_free_memory(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "refuse_model", lambda configurator: None)
    profiled = lambda configurator, before: 7  # noqa: E731
    assert hooks._virtual_bytes(profiled, SimpleNamespace(mambaish_config=None), 1.0) == 1000
    hybrid = SimpleNamespace(mambaish_config=object())
    assert hooks._virtual_bytes(profiled, hybrid, 1.0) == 7, "fixed states come from free memory"
    assert start.asked == [1000, 7]


def test_without_a_start_there_is_no_elastic_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_current", None)
    with pytest.raises(InvariantError, match="only a scheduler that started with kvcached can make"):
        hooks._load_model(nothing, SimpleNamespace(is_draft_worker=False))


@pytest.mark.parametrize(("asked", "found", "stops"), [("1", 1, True), ("1", 2, False), ("0", 0, False)])
def test_a_parent_counts_the_elastic_ranks_if_they_were_asked_for(
    asked: str, found: int, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", asked)
    monkeypatch.setattr(startup_check, "elastic_ranks", lambda: found)
    if stops:
        with pytest.raises(
            InvariantError,
            match="an elastic KV cache was asked for, and 1 of 2 schedulers have one: this server stops",
        ):
            hooks._require_elastic_ranks([{}, {}])
    else:
        hooks._require_elastic_ranks([{}, {}])
