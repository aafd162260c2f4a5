"""benchmarks.micro.burst measures each part of each round, and leaves no thread running."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from benchmarks.micro import burst

PARTS = {"first", "step", "claim", "both_steps", "give_back"}


def test_a_result_has_all_parts_of_all_rounds_and_no_thread_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "burst.json"
    assert burst.main(["--host", "--rounds", "2", "--out", str(out)]) == 0
    samples = json.loads(out.read_text())["samples"]
    assert set(samples) == {f"{place}_{part}_ms" for place in ("alone", "beside") for part in PARTS}
    assert all(len(values) == 2 and min(values) > 0 for values in samples.values())
    for place in ("alone", "beside"):
        parts = [samples[f"{place}_{part}_ms"] for part in ("first", "step", "both_steps")]
        assert all(first <= step <= both for first, step, both in zip(*parts, strict=True))
    assert "beside_give_back" in capsys.readouterr().out
    assert not {thread.name for thread in threading.enumerate()} & {"computes", "kvcached-supply"}


def test_no_rounds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        burst.main(["--rounds", "0", "--out", str(tmp_path / "burst.json")])
    assert "--rounds is 0" in capsys.readouterr().err
