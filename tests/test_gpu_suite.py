"""benchmarks.gpu_suite gives each benchmark options that it knows, and goes on after a failure."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import STEPS, Settings, Step, command, environment, main, run_all
from devkit.polling import until
from devkit.process_groups import table
from tools.wheels import ROOT

PYTHONS = {"vllm": sys.executable, "sglang": sys.executable}
NO_SITES: dict[str, Path | None] = {"vllm": None, "sglang": None}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "out", PYTHONS, NO_SITES)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "driver"])
def test_each_benchmark_knows_every_option_it_is_given(settings: Settings, name: str) -> None:
    words = command(name, settings._replace(headroom="1GiB", sites={"vllm": Path("a"), "sglang": Path("b")}))
    done = subprocess.run([*words[:3], "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_each_engine_finds_its_own_packages_first(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/more")
    ours = settings._replace(sites={"vllm": tmp_path / "v", "sglang": None})
    assert environment("vllm_outputs", ours)["PYTHONPATH"] == f"{tmp_path / 'v'}{os.pathsep}/more"
    assert environment("sglang_outputs_layer", ours)["PYTHONPATH"] == "/more"
    assert environment("beside", ours)["PYTHONPATH"] == "/more"
    assert f"--vllm-site {tmp_path / 'v'}" in shlex.join(command("beside", ours))
    assert "--sglang-site" not in command("beside", ours)


def test_a_step_that_fails_or_is_late_stops_no_other_step_and_leaves_no_process(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "fake_steps"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "wrong.py").write_text("import sys\nprint('no GPU here')\nsys.exit(3)\n")
    (package / "late.py").write_text(
        "import os, pathlib, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "pathlib.Path(os.environ['CHILD']).write_text(str(child.pid))\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.pause()\n"
    )
    (package / "right.py").touch()
    monkeypatch.setattr(gpu_suite, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(gpu_suite, "STEPS", {
        "wrong": Step("vllm", 60, "fake_steps.wrong"), "late": Step("vllm", 3, "fake_steps.late"),
        "right": Step("vllm", 60, "fake_steps.right"),
    })  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    assert run_all(["wrong", "late", "right"], settings) == ["wrong", "late"]
    said = capsys.readouterr().out
    assert "failed with status 3" in said and "no GPU here" in said and "late: stopped" in said
    child = int((tmp_path / "child").read_text())
    until(lambda: child not in table() or table()[child].zombie, 5, "nothing of its group is left")


def test_print_shows_the_commands_in_the_order_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print", "--steps", "sleep", "driver", "--headroom", "56GiB", "--out", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"-m benchmarks.engine.sleep --rounds 3 --out {tmp_path}/sleep.json" in first
    assert first.endswith("--headroom 56GiB") and "test_driver_cuda.py" in second


def test_an_unknown_step_exits_with_2_and_names_all_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--steps", "walk"])
    assert ended.value.code == 2 and "vllm_outputs" in capsys.readouterr().err
