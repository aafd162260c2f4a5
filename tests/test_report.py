"""tools.test_report: the suite's counts of the tests' work, and their minima."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from devkit import report
from tools import test_report

JUNIT = (
    '<testsuites><testsuite tests="5" failures="{failures}" errors="0" skipped="1"><testcase>'
    '<skipped message="no tmux"/></testcase></testsuite></testsuites>'
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(report.VARIABLE, str(tmp_path / "counts"))
    return tmp_path / "counts"


def test_counts_add_up_over_processes(source: Path) -> None:
    report.record("a", 2)
    child = multiprocessing.get_context("spawn").Process(target=report.record, args=("a", 3))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    report.record("b", 1)
    assert report.collect(source) == {"a": 5, "b": 1}
    assert len(list(source.iterdir())) == 2


def test_a_count_cannot_fall(source: Path) -> None:
    with pytest.raises(ValueError, match="cannot fall"):
        report.record("a", -1)
    assert report.collect(source) == {}


@pytest.mark.parametrize(
    ("counted", "failures", "sentence"), [(9, 0, ""), (4, 0, "a: 4"), (9, 1, "1 failures")]
)
def test_a_count_under_its_minimum_or_a_failed_test_is_wrong(
    source: Path, tmp_path: Path, counted: int, failures: int, sentence: str
) -> None:
    report.record("a", counted)
    junits, written = (tmp_path / "one.xml", tmp_path / "two.xml"), tmp_path / "report.json"
    junits[0].write_text(JUNIT.format(failures=0))
    junits[1].write_text(JUNIT.format(failures=failures))
    wrong = test_report.write(written, junits, source, {"a": 5})
    assert bool(wrong) == bool(sentence)
    assert sentence in "".join(wrong)
    text = json.loads(written.read_text())
    assert text["counts"] == {"a": counted} and text["skips"] == {"no tmux": 2}
    assert text["tests"] == {
        "tests": 10,
        "failures": failures,
        "errors": 0,
        "skipped": 2,
        "passed": 8 - failures,
    }


def test_a_missing_count_is_wrong() -> None:
    assert test_report.shortfalls({}, {"a": 1}) == ["a: 0 counted, at least 1 expected"]
