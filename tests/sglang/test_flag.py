"""Choosing kvcached: by flag, by variable, by context manager; and a process that does not choose it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.entrypoints import engine
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

import sglang_kvcached
from kvcached_core.config import SWITCH_VARIABLE
from kvcached_core.errors import ConfigError, UnsupportedError
from sglang_kvcached import flag, hooks, process_state, seams

READY = "_wait_for_scheduler_ready"
_WRAPPED = ((ServerArgs, "add_cli_args"), (ServerArgs, "from_cli_args"), (engine, READY))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hook only the command line in this process, and undo it after the test."""
    for owner, name in _WRAPPED:
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    for variable in (SWITCH_VARIABLE, process_state.RUN_VARIABLE, "KVCACHED_WEIGHT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(hooks, "_registered", set())
    monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler")  # this process is no scheduler
    HookRegistry.reset()
    yield
    HookRegistry.reset()


def load() -> None:
    """Load the plugin as SGLang does."""
    sglang_kvcached.register()
    HookRegistry.apply_hooks()


def choose(*words: str) -> Any:
    """Parse a command line as SGLang does; return its arguments."""
    load()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(["--model-path", "m", *words]))


def is_watched() -> bool:
    """Say whether the parent checks its schedulers."""
    return hasattr(getattr(engine, READY), "__wrapped__")


def test_without_a_choice_everything_is_stock() -> None:
    assert choose().model_path == "m"
    assert SWITCH_VARIABLE not in os.environ
    assert not is_watched()


@pytest.mark.parametrize("words", [("--kv-cache-backend", "kvcached"), ("--kv-cache-backend=kvcached",)])
def test_the_flag_reaches_the_schedulers_and_their_parent_checks_them(words: tuple[str, ...]) -> None:
    assert choose(*words).model_path == "m"
    assert os.environ[SWITCH_VARIABLE] == "1"
    assert is_watched()


def test_the_variable_is_the_flags_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "true")
    choose()
    assert os.environ[SWITCH_VARIABLE] == "true"
    assert is_watched()


def test_the_flag_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "1")
    choose("--kv-cache-backend", "default")
    assert os.environ[SWITCH_VARIABLE] == "0", "no child process is elastic"


def test_an_unknown_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        choose("--kv-cache-backend", "elastic")
    assert "invalid choice: 'elastic'" in capsys.readouterr().err


def test_options_that_cannot_be_combined_end_the_command_with_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        choose("--kv-cache-backend", "kvcached", "--enable-memory-saver")
    assert end.value.code == 2
    assert "sglang: error: --kv-cache-backend kvcached: the memory saver" in capsys.readouterr().err
    assert choose("--kv-cache-backend", "default", "--enable-memory-saver").enable_memory_saver


def test_an_illegal_setting_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVCACHED_WEIGHT", "heavy")
    assert choose().model_path == "m", "kvcached was not chosen"
    with pytest.raises(SystemExit):
        choose("--kv-cache-backend", "kvcached")
    assert "KVCACHED_WEIGHT='heavy': expected 1 to 1000000" in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["banana", "1"])
def test_a_process_ends_if_kvcached_is_chosen_and_cannot_be_used(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, switch)
    monkeypatch.setattr(seams, "sglang_version", lambda: "0.5.22")
    with pytest.raises(SystemExit, match=r"sglang-kvcached: .*(banana.*expected|0\.5\.22 is installed)"):
        sglang_kvcached.register()
    assert not HookRegistry._hooks


def test_a_plugin_that_does_not_fit_leaves_a_stock_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seams, "sglang_version", lambda: "0.5.22")
    load()
    assert not HookRegistry._hooks
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("sglang-kvcached is not active: sglang-kvcached needs SGLang 0.5.23 or newer")


def test_registering_twice_changes_nothing() -> None:
    load()
    once, run = ServerArgs.__dict__["add_cli_args"], os.environ[process_state.RUN_VARIABLE]
    load()
    assert ServerArgs.__dict__["add_cli_args"] is once
    assert os.environ[process_state.RUN_VARIABLE] == run
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flag.add_flag(None, parser)  # an existing option of this name is left alone


def test_importing_the_package_imports_neither_the_engine_nor_torch() -> None:
    code = "import sys, sglang_kvcached; print({'sglang', 'torch', 'pluggy'} & {*sys.modules})"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_engines_started_inside_the_context_are_elastic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "require", lambda: None)
    monkeypatch.setenv("KVCACHED_WEIGHT", "7")
    with sglang_kvcached.elastic(limit="2GiB", weight=3):
        inside = dict(os.environ)
    assert (inside[SWITCH_VARIABLE], inside["KVCACHED_LIMIT"], inside["KVCACHED_WEIGHT"]) == (
        "1",
        "2GiB",
        "3",
    )
    assert os.environ["KVCACHED_WEIGHT"] == "7"
    assert not {SWITCH_VARIABLE, "KVCACHED_LIMIT"} & set(os.environ)


def test_the_context_refuses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match=r"unknown setting kvcached\.speed"),
        sglang_kvcached.elastic(speed=1),
    ):
        pass
    monkeypatch.setattr(seams, "sglang_version", lambda: "0.4.0")
    with pytest.raises(UnsupportedError, match=r"0\.4\.0 is installed"), sglang_kvcached.elastic():
        pass
    assert SWITCH_VARIABLE not in os.environ
