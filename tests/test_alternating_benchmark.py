"""What benchmarks.alternating and its profiles say of engines whose every round is known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import profiles
from benchmarks.alternating import PAUSE_SECONDS, PHASES, Found, Play, Shape, compared


class FakeContender:
    """Does what it is told at once, and writes it down where the others do."""

    def __init__(self, name: str, did: list[str], rate: float, profile: dict[str, Any] | Exception) -> None:
        self.name, self.owner = name, None
        self._did, self._rate, self._profile = did, rate, profile

    def round(self, shape: Shape) -> float:
        self._did.append(f"{self.name} {shape.requests}x({shape.prompt}+{shape.generate})")
        return self._rate

    def flush(self) -> None:
        self._did.append(f"{self.name} flush")

    def rest(self, seconds: float) -> float:
        self._did.append(f"{self.name} rest {seconds:g}")
        return seconds + 1.0

    def profiled(self, shape: Shape) -> dict[str, Any]:
        if isinstance(self._profile, Exception):
            raise self._profile
        return self._profile


def played(monkeypatch: pytest.MonkeyPatch, profile: dict[str, Any] | Exception) -> tuple[list[str], Found]:
    did: list[str] = []
    found = Found()
    contenders: Any = [
        FakeContender("stock", did, 100.0, profile), FakeContender("kvcached", did, 99.0, profile)
    ]  # fmt: skip
    monkeypatch.setattr("benchmarks.alternating.Contender", FakeContender)
    Play(contenders, Shape(32, 512, 128), 2, found).run(profiles=True)
    return did, found


def test_contenders_take_turns_and_begin_every_phase_in_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    did, found = played(monkeypatch, {"busy": 1.0})
    rest = f"rest {PAUSE_SECONDS:g}"  # as long for either: a device that was idle begins slowly
    order = ["stock", "kvcached", "kvcached", "stock"]
    turns = [f"{name} {what}" for name in order for what in (rest, "32x(512+128)", "flush")]
    begun = did.index(f"stock {rest}", did.index(f"kvcached {rest}"))  # after the first rounds
    assert did[begun : begun + len(turns)] == turns
    # Two rounds fill, two are measured, nothing is forgotten.
    full = did[begun + len(turns) :][:8]
    assert full == [f"{name} 32x(512+128)" for name in ["stock", "kvcached"] * 2 + order]
    assert (
        found.samples["rest_seconds_stock"] == [PAUSE_SECONDS + 1.0] * 4
    )  # the first rounds', and a profile's
    assert "kvcached 32x(512+1)" in did and "kvcached 32x(16+256)" in did
    for phase in PHASES:
        assert found.samples[f"{phase}_tokens_per_second_kvcached"] == [99.0, 99.0]
        assert found.samples[f"{phase}_tokens_per_second_stock"] == [100.0, 100.0]
    assert set(found.profiles) == {f"{p}_{e}" for p in ("growing", "steady") for e in ("stock", "kvcached")}


def test_a_profile_that_fails_loses_nothing_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = played(monkeypatch, TimeoutError("no answer"))
    assert found.profiles["steady_stock"] == {"error": "no answer"}
    assert found.samples["steady_tokens_per_second_stock"] == [100.0, 100.0]


def test_ratios_are_taken_round_by_round() -> None:
    assert compared("x", [50.0, 150.0], [100.0, 100.0]) == "x 100 (1.0000 +- 0.5000)"
    assert compared("x", [99.0], [100.0]) == "x 99 (0.9900 +- 0.0000)"


def event(begun: float, took: float, name: str, kind: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "ts": begun, "dur": took, "name": name}


def test_a_profile_counts_time_once_however_many_kernels_ran() -> None:
    second = 1e6
    seen = profiles.summary(
        [
            event(3 * second, second, "late"), event(0.0, 2 * second, "a"), event(second, 0.5 * second, "b"),
            event(0.0, 9 * second, "cudaLaunchKernel", "cuda_runtime"), {"ph": "M", "name": "process"},
        ]
    )  # fmt: skip
    assert seen["span"] == 4.0 and seen["busy"] == 3.0 and seen["gaps"] == [(2.0, 1.0)]
    assert [kernel["name"] for kernel in seen["kernels"]] == ["a", "late", "b"]
    assert seen["kernels"][0] == {"name": "a", "count": 1, "seconds": 2.0}


@pytest.mark.parametrize("packed", [False, True])
def test_a_trace_is_read_packed_or_not_and_must_be_the_only_one(tmp_path: Path, packed: bool) -> None:
    with pytest.raises(ValueError, match="one trace was expected"):
        profiles.read(tmp_path)
    raw = json.dumps({"traceEvents": [event(0.0, 1.0, "a")]}).encode()
    path = tmp_path / f"x.trace.json{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert profiles.read(tmp_path) == [event(0.0, 1.0, "a")]
    assert profiles.summary([]) == {"span": 0.0, "busy": 0.0, "gaps": [], "kernels": []}
