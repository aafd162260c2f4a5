"""Every published ratio follows from the raw samples in the same file."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import record
from benchmarks.lib.pool_results import pooled
from tools.check_results import RESULTS, check_folder, check_result, main

GOOD: dict[str, Any] = {
    "schema": 1,
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "clean": True,
    "device": {"name": "a device", "uuid": "GPU-1", "driver": "1.2"},
    "versions": {"python": "3.11.0"},
    "command": ["python", "-m", "benchmarks.something"],
    "started": "2026-01-02T03:04:05+00:00",
    "wall_seconds": 12.5,
    "samples": {"stock": [2.0, 4.0, 3.0], "elastic": [3.0, 3.0, 6.0]},
    "ratios": {
        "speed": {"numerator": "elastic", "denominator": "stock", "statistic": "median", "value": 1.0},
        "mean": {"numerator": "elastic", "denominator": "stock", "statistic": "mean", "value": 4 / 3},
        "least": {"numerator": "elastic", "denominator": "stock", "statistic": "min", "value": 1.5},
    },
}
DAMAGE: list[tuple[tuple[str, ...], Any, str]] = [
    (("ratios", "speed", "value"), 1.00001, "the samples give 1.0"),
    (("ratios", "mean", "value"), "1.3333333", "the samples give"),
    (("ratios", "speed", "statistic"), "best", "expected one of"),
    (("ratios", "speed", "numerator"), "gone", "KeyError"),
    (("samples", "stock"), [], "samples.stock"),
    (("samples", "stock"), [1.0, float("nan")], "samples.stock"),
    (("samples", "stock"), [0.0, 0.0], "a ratio over zero"),
    (("samples",), {}, "samples: empty"),
    (("commit",), "main", "40 hex digits"),
    (("clean",), False, "no commit holds"),
    (("clean",), "yes", "clean: wrong type"),
    (("schema",), 2, "expected 1"),
    (("device", "uuid"), "", "device.uuid"),
    (("versions",), {}, "versions.python"),
    (("command",), [], "command"),
    (("started",), "yesterday", "started"),
    (("wall_seconds",), 0, "wall_seconds"),
]


def damaged(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return the good result with one value replaced."""
    result = copy.deepcopy(GOOD)
    place = result
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return result


def test_every_published_result_holds() -> None:
    assert check_folder(RESULTS) == []


def test_a_good_result_passes() -> None:
    assert check_result(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "sentence"), DAMAGE, ids=lambda v: ".".join(v) if isinstance(v, tuple) else ""
)
def test_a_damaged_result_is_refused(path: tuple[str, ...], value: Any, sentence: str) -> None:
    assert sentence in "\n".join(check_result(damaged(path, value)))


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_missing_field_is_refused(name: str) -> None:
    assert check_result({key: value for key, value in GOOD.items() if key != name}) == [f"{name}: missing"]


def test_the_command_fails_on_one_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    assert main([str(tmp_path)]) == 0
    (tmp_path / "bad.json").write_text("{")
    assert main([str(tmp_path)]) == 1
    assert "bad.json: not JSON" in capsys.readouterr().out


def test_a_written_result_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "commit", lambda: (GOOD["commit"], True))
    started = time.time() - 1
    ratios = {"speed": record.Ratio("elastic", "stock", "mean")}
    record.write(
        tmp_path / "new.json", GOOD["command"], GOOD["samples"], ratios, started, {"remark": "small"}
    )
    assert check_folder(tmp_path) == []
    result = json.loads((tmp_path / "new.json").read_text())
    assert result["ratios"]["speed"]["value"] == pytest.approx(4 / 3)
    assert result["notes"] == {"remark": "small"}
    assert 1 <= result["wall_seconds"] < 60


def test_a_benchmark_cannot_write_a_ratio_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        record.write(tmp_path / "new.json", ["x"], {"a": [1.0]}, {"r": record.Ratio("a", "b")}, time.time())
    assert not list(tmp_path.iterdir())


def test_a_tree_without_git_takes_its_commit_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("BENCHMARK_COMMIT", GOOD["commit"])
    monkeypatch.delenv("BENCHMARK_COMMIT_CLEAN", raising=False)
    assert record.commit() == (GOOD["commit"], False)
    monkeypatch.setenv("BENCHMARK_COMMIT_CLEAN", "1")
    assert record.commit() == (GOOD["commit"], True)


def test_pooled_runs_keep_every_sample_and_their_ratios_follow() -> None:
    one = json.loads((RESULTS / "fence_stress.json").read_text()) | {
        "samples": {"a": [1.0, 3.0], "b": [2.0]},
        "ratios": {"r": {"numerator": "a", "denominator": "b", "statistic": "median", "value": 1.0}},
    }
    two = one | {"samples": {"a": [5.0], "b": [4.0]}}
    result = pooled([one, two])
    assert result["samples"] == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0]}
    assert result["ratios"]["r"]["value"] == 1.0
    assert check_result(result) == []
    with pytest.raises(ValueError, match="differ in commit"):
        pooled([one, two | {"commit": "0" * 40}])


def test_a_result_is_written_with_one_line_for_each_sample_and_reads_back_equal() -> None:
    text = record.compact(GOOD)
    assert json.loads(text) == GOOD
    assert '  "stock": [2.0, 4.0, 3.0],' in text.splitlines()
