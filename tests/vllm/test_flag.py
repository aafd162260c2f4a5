"""Choosing kvcached: by flag, by variable, by keyword arguments; and a process that does not choose it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.core import EngineCoreProc

import vllm_kvcached
from kvcached_core.config import SWITCH_VARIABLE
from kvcached_core.errors import ConfigError, UnsupportedError
from vllm_kvcached import SCHEDULER, WORKER, flag, seams

OURS, STOCK = (WORKER, SCHEDULER), ("auto", None)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the test, unwrap vLLM's functions and restore the environment."""
    for owner, name in ((EngineArgs, "add_cli_args"), (EngineCoreProc, "_process_input_queue")):
        monkeypatch.setattr(owner, name, owner.__dict__[name])
    for variable in (SWITCH_VARIABLE, vllm_kvcached.RUN_VARIABLE, "KVCACHED_WEIGHT"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def choose(*words: str) -> tuple[Any, Any]:
    """Parse a command line with vLLM's parser; return the worker and scheduler classes."""
    vllm_kvcached.register()
    chosen = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(words))
    assert not hasattr(chosen, "kv_cache_backend"), "vLLM would not know what to do with it"
    return chosen.worker_cls, chosen.scheduler_cls


def test_without_a_choice_everything_is_stock() -> None:
    assert choose() == STOCK
    assert SWITCH_VARIABLE not in os.environ


@pytest.mark.parametrize("words", [("--kv-cache-backend", "kvcached"), ("--kv-cache-backend=kvcached",)])
def test_the_flag_names_our_worker_and_scheduler(words: tuple[str, ...]) -> None:
    assert choose(*words) == OURS
    assert os.environ[SWITCH_VARIABLE] == "1", "the engine's process refuses to be stock"


def test_the_variable_is_the_flags_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "true")
    assert choose() == OURS
    assert choose("--kv-cache-backend", "kvcached") == OURS


def test_the_flag_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "1")
    assert choose("--kv-cache-backend", "default") == STOCK
    assert os.environ[SWITCH_VARIABLE] == "0", "the engine's process does not ask for what was refused"


def test_the_last_flag_wins() -> None:
    assert choose("--kv-cache-backend", "kvcached", "--kv-cache-backend", "default") == STOCK


@pytest.mark.parametrize("option", ["--worker-cls", "--scheduler-cls"])
def test_another_worker_or_scheduler_is_a_conflict(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        choose(option, "mine.Own", "--kv-cache-backend", "kvcached")
    assert end.value.code == 2
    assert f"--kv-cache-backend kvcached brings its own {option}: leave out" in capsys.readouterr().err


def test_default_leaves_another_worker_alone() -> None:
    assert choose("--worker-cls", "mine.Own", "--kv-cache-backend", "default") == ("mine.Own", None)


def test_an_unknown_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        choose("--kv-cache-backend", "elastic")
    assert "invalid choice: 'elastic'" in capsys.readouterr().err


def test_a_switch_that_is_neither_on_nor_off_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "banana")
    with pytest.raises(ConfigError, match="ENABLE_KVCACHED='banana'"):
        vllm_kvcached.register()  # in a process with an engine
    flag.install()
    with pytest.raises(SystemExit):
        EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert "ENABLE_KVCACHED='banana': expected 1, true, yes or on" in capsys.readouterr().err


@pytest.mark.parametrize("by_flag", [True, False])
def test_an_engine_that_cannot_be_elastic_is_an_error_not_stock(
    by_flag: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.29.3")
    if not by_flag:
        monkeypatch.setenv(SWITCH_VARIABLE, "1")
    with pytest.raises(SystemExit):
        choose(*(("--kv-cache-backend", "kvcached") if by_flag else ()))
    assert "needs vLLM 0.30 or newer, and 0.29.3 is installed" in capsys.readouterr().err


def test_an_illegal_setting_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVCACHED_WEIGHT", "heavy")
    assert choose() == STOCK, "nobody asked"
    with pytest.raises(SystemExit):
        choose("--kv-cache-backend", "kvcached")
    assert "KVCACHED_WEIGHT='heavy': expected 1 to 1000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--additional-config", '{"kvcached": {"limit": "much"}}'],
        ["--additional-config.kvcached.limit", "much"],
    ],
)
@pytest.mark.parametrize("by", ["the flag before", "the flag after", "the variable"])
def test_an_illegal_setting_of_the_command_line_is_an_error_at_once(
    options: list[str], by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose(*options) == choose(*options, "--kv-cache-backend", "default") == STOCK, "nobody asked"
    os.environ.pop(SWITCH_VARIABLE)
    flag = ["--kv-cache-backend", "kvcached"]
    words = {
        "the flag before": [*flag, *options],
        "the flag after": [*options, *flag],
        "the variable": options,
    }
    if by == "the variable":
        monkeypatch.setenv(SWITCH_VARIABLE, "1")
    with pytest.raises(SystemExit):
        choose(*words[by])
    assert "kvcached.limit='much': expected" in capsys.readouterr().err


def test_other_keys_of_the_additional_config_are_left_alone() -> None:
    for value in ('{"theirs": 1, "kvcached": {"limit": "1GiB"}}', "theirs"):
        assert choose("--kv-cache-backend", "kvcached", "--additional-config", value) == OURS


def test_registering_twice_changes_nothing() -> None:
    vllm_kvcached.register()
    once, run = EngineArgs.add_cli_args, os.environ[vllm_kvcached.RUN_VARIABLE]
    vllm_kvcached.register()
    assert EngineArgs.add_cli_args is once and os.environ[vllm_kvcached.RUN_VARIABLE] == run
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert flag.add_flag(parser) is parser, "an option of this name that is there already is left alone"


def test_a_process_that_does_not_choose_has_no_changed_class() -> None:
    before = EngineCoreProc._process_input_queue
    vllm_kvcached.register()
    assert EngineCoreProc._process_input_queue is before


def test_a_process_with_the_variable_on_wraps_the_input_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    before = EngineCoreProc._process_input_queue
    monkeypatch.setenv(SWITCH_VARIABLE, "1")
    vllm_kvcached.register()
    wrapped = EngineCoreProc._process_input_queue
    assert wrapped is not before and wrapped.__wrapped__ is before
    vllm_kvcached.register()
    assert EngineCoreProc._process_input_queue is wrapped


def test_registering_imports_neither_the_engine_nor_torch() -> None:
    code = "import sys, vllm_kvcached as k; k.register(); print({'vllm', 'torch', 'pluggy'} & {*sys.modules})"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_keyword_arguments_name_our_classes_and_carry_settings() -> None:
    assert vllm_kvcached.llm_kwargs(limit="2GiB", weight=3) == {
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "additional_config": {"kvcached": {"limit": "2GiB", "weight": 3}},
    }


def test_keyword_arguments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting kvcached\.speed"):
        vllm_kvcached.llm_kwargs(speed=1)
    with pytest.raises(ConfigError, match=r"kvcached\.weight='0': expected 1 to 1000000"):
        vllm_kvcached.llm_kwargs(weight=0)
    monkeypatch.setattr(seams, "vllm_version", lambda: "0.20.0")
    with pytest.raises(UnsupportedError, match=r"0\.20\.0 is installed"):
        vllm_kvcached.llm_kwargs()
