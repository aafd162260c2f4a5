"""If a server cannot be elastic as asked, it fails at the start with the reason and never runs as stock."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from devkit.client import Answers, Prompt
from devkit.report import record
from devkit.servers import Child, Fleet
from devkit.sglang_servers import ENVIRONMENT, SglangServer
from devkit.watch import owners
from tests.engine.conftest import ELASTIC
from tests.sglang_engine.conftest import MODEL_FLAGS, PAGED, SETTINGS, TOKENS
from tests.sglang_engine.offline import ANSWER, PROMPTS_VARIABLE

pytestmark = pytest.mark.engine

_SECONDS = 180.0


def _refusal(fleet: Fleet, child: Child) -> str:
    """Return the log of an engine that must not start."""
    with fleet.running(child):
        assert child.wait(_SECONDS) != 0
        return child.text()


def test_a_wrong_setting_is_refused_by_name(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    wrong = {"KVCACHED_LIMIT": "much"}
    server = SglangServer("sglang-setting", model, tmp_path / "run", [*MODEL_FLAGS, *ELASTIC], wrong)
    assert "sglang: error: KVCACHED_LIMIT='much': expected" in _refusal(fleet, server)


def test_a_scheduler_that_is_stock_all_the_same_stops_its_server(
    fleet: Fleet, model: Path, tmp_path: Path
) -> None:
    extra = SETTINGS | {"SGLANG_RIG": "forget"}
    server = SglangServer("sglang-forget", model, tmp_path / "run", [*MODEL_FLAGS, *TOKENS, *ELASTIC], extra)
    text = _refusal(fleet, server)
    assert "an elastic KV cache was asked for, and 0 of 1 schedulers have one: this server stops" in text
    assert "ready to roll" not in text


def test_a_limit_below_one_request_is_refused_with_both_numbers(
    fleet: Fleet, model: Path, tmp_path: Path
) -> None:
    extra = SETTINGS | {"KVCACHED_LIMIT": "2MiB", "ENABLE_KVCACHED": "true"}
    server = SglangServer("sglang-limit", model, tmp_path / "run", [*MODEL_FLAGS, *PAGED], extra)
    text = _refusal(fleet, server)
    assert "kvcached: this engine cannot start: the limit of 2 MiB is less than the 9 MiB" in text
    assert not owners(tmp_path / "run")


def test_i12_an_engine_in_a_python_program_is_elastic_inside_the_context(
    fleet: Fleet, model: Path, tmp_path: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    command = [sys.executable, "-m", "tests.sglang_engine.offline", str(model)]
    chosen = prompts[:6]
    (tmp_path / "prompts.json").write_text(json.dumps(chosen))
    extra = ENVIRONMENT | {PROMPTS_VARIABLE: str(tmp_path / "prompts.json")}
    child = Child("sglang-offline", tmp_path / "run", command, extra)
    with fleet.running(child):
        assert child.wait(_SECONDS) == 0
        (line,) = [line for line in child.text().splitlines() if line.startswith(ANSWER)]
    said = json.loads(line.removeprefix(ANSWER))
    assert [tuple(ids) for ids in said["ids"]] == [stock[prompt] for prompt in chosen]
    assert said["elastic"] == [["offline", True]]
    assert not owners(tmp_path / "run"), "nothing is left when the program has ended"
    record("sglang.compared", len(chosen))
    assert os.environ.get("ENABLE_KVCACHED") is None
