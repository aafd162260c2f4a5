"""tools.test_runs: the runs of a stage run at once, a failed run stops no other, an interrupt ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devkit.polling import until
from devkit.process_groups import table
from tools import test_runs
from tools.test_runs import STAGES, Run, main

ALL = {"alone and not engine", "engine", "not alone and not engine"}  # every test is in one of them
MEETING = """
import os, time
from pathlib import Path
def test_{name}():
    here = Path(__file__).parent
    (here / "{name}").write_text(str(os.getpid()))
    while not (here / "{other}").exists():
        time.sleep(0.01)
    assert {right}
"""
ENDLESS = """
import os, signal
from pathlib import Path
def test_endless():
    Path({begun!r}).write_text(str(os.getpid()))
    try:
        signal.pause()
    finally:
        Path({ended!r}).touch()
"""


def _run(folder: Path, name: str, text: str) -> Run:
    file = folder / f"test_{name}.py"
    file.write_text(text)
    return Run(name, sys.executable, f"-p no:cacheprovider {file}")


@pytest.fixture(autouse=True)
def _build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_runs, "BUILD", tmp_path)


@pytest.fixture(autouse=True)
def _handlers() -> object:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield None
    for each, handler in before.items():
        signal.signal(each, handler)


def test_every_vllm_test_is_in_exactly_one_run() -> None:
    commands = [run.command() for stage in STAGES for run in stage if run.python == test_runs.VLLM]
    assert sorted(words[words.index("-m", 3) + 1] for words in commands) == sorted(ALL)


def test_the_runs_of_a_stage_run_at_once_and_a_failed_one_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = _run(tmp_path, "one", MEETING.format(name="one", other="two", right=True))
    second = _run(tmp_path, "two", MEETING.format(name="two", other="one", right=False))
    third = _run(tmp_path, "three", "def test_three(): pass")
    monkeypatch.setattr(test_runs, "STAGES", ((first, second), (third,)))
    assert main() == 1
    said = capfd.readouterr()
    assert "failed: two" in said.err
    assert said.out.count("1 passed") == 2 and "1 failed" in said.out, "the log of the second is shown"
    assert {path.name for path in tmp_path.glob("*.xml")} == {"one.xml", "two.xml", "three.xml"}
    assert (tmp_path / "one").read_text() != (tmp_path / "two").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_run_in_order(tmp_path: Path, number: signal.Signals) -> None:
    names = ("one", "two")
    marks = {name: (tmp_path / f"{name}-begun", tmp_path / f"{name}-ended") for name in names}
    runs = [
        _run(tmp_path, name, ENDLESS.format(begun=str(begun), ended=str(ended)))
        for name, (begun, ended) in marks.items()
    ]
    program = (
        "import sys; from pathlib import Path; from tools import test_runs; from tools.test_runs import Run\n"
        f"test_runs.BUILD = Path({str(tmp_path)!r}); test_runs.STAGES = (({', '.join(map(repr, runs))}),)\n"
        "sys.exit(test_runs.main())"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=test_runs.ROOT) as runner:
        until(lambda: all(begun.exists() and begun.read_text() for begun, _ in marks.values()), 60, "all run")
        children = [int(begun.read_text()) for begun, _ in marks.values()]
        os.kill(runner.pid, number)
        assert runner.wait(60) == 130
    assert all(ended.exists() for _, ended in marks.values())
    assert not any(pid in table() for pid in children)


def test_tests_that_start_an_engine_are_in_the_folders_of_the_engine_runs() -> None:
    tests = test_runs.ROOT / "tests"
    marked = {path for path in tests.rglob("test_*.py") if "mark.engine\n" in path.read_text()}
    assert marked == {*(tests / "engine").glob("test_*.py"), *(tests / "sglang_engine").glob("test_*.py")}
