"""If an engine cannot be elastic as asked, it fails at the start with the reason and never runs as stock."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devkit.servers import Child, Fleet, Server
from tests.engine.conftest import ELASTIC, MODEL_FLAGS
from tests.engine.offline import PROMPTS_VARIABLE

pytestmark = pytest.mark.engine

_SECONDS = 180.0


def _refusal(fleet: Fleet, child: Child) -> str:
    """Return the log of an engine that must not start."""
    with fleet.running(child):
        assert child.wait(_SECONDS) != 0
        return child.text()


def test_a_wrong_setting_is_refused_by_name(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    options = ["--additional-config", '{"kvcached": {"limit": "much"}}']
    server = Server("wrong-setting", model, tmp_path / "run", [*MODEL_FLAGS, *ELASTIC, *options], {})
    assert "kvcached.limit='much': expected" in _refusal(fleet, server)


def test_another_worker_class_is_refused(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    other = ["--worker-cls", "vllm.v1.worker.cpu_worker.CPUWorker"]
    server = Server("worker-class", model, tmp_path / "run", [*MODEL_FLAGS, *other, *ELASTIC], {})
    text = _refusal(fleet, server)
    assert "leave out --worker-cls vllm.v1.worker.cpu_worker.CPUWorker" in text


def test_a_python_program_with_the_variable_but_without_llm_kwargs_is_refused(
    fleet: Fleet, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.engine.offline", "bare", str(model)]
    (tmp_path / "prompts.json").write_text("[[[5, 6, 7], 4]]")
    extra = {"ENABLE_KVCACHED": "true", PROMPTS_VARIABLE: str(tmp_path / "prompts.json")}
    text = _refusal(fleet, Child("bare", tmp_path / "run", command, extra))
    assert "use LLM(..., **vllm_kvcached.llm_kwargs()), or unset ENABLE_KVCACHED" in text
    assert "offline answer" not in text
