"""benchmarks.engine.alternating: its phases and results, with fake engines of known speed."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine.alternating import PAUSE_SECONDS, PHASES, Found, Play, Shape, compared
from benchmarks.lib import cpus, profiles


class FakeContender:
    """An engine that finishes every operation at once, and appends it to a list that all engines share."""

    def __init__(self, name: str, did: list[str], rate: float, profile: dict[str, Any] | Exception) -> None:
        self.name, self.owner, self.works = name, None, True
        self.others: list[FakeContender] = []
        self._did, self._rate, self._profile = did, rate, profile

    def place(self, works: bool) -> None:
        self.works = works

    def round(self, shape: Shape) -> float:
        assert self.works and not any(one.works for one in self.others)
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
    for one, other in (contenders, contenders[::-1]):
        one.others = [other]
    monkeypatch.setattr("benchmarks.engine.alternating.Contender", FakeContender)
    Play(contenders, Shape(32, 512, 128), 2, found, free_bytes=lambda: 7).run(profiles=True)
    return did, found


def test_contenders_take_turns_and_begin_every_phase_in_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    did, found = played(monkeypatch, {"busy": 1.0})
    rest = f"rest {PAUSE_SECONDS:g}"  # equal pauses: after a pause the device is slow for either engine
    order = ["stock", "kvcached", "kvcached", "stock"]
    turns = [f"{name} {what}" for name in order for what in (rest, "32x(512+128)", "flush")]
    begun = did.index(f"stock {rest}", did.index(f"kvcached {rest}"))  # after the first rounds
    assert did[begun : begun + len(turns)] == turns
    # Two rounds fill the cache, two are measured, and the cache is never dropped between them.
    full = did[begun + len(turns) :][:8]
    assert full == [f"{name} 32x(512+128)" for name in ["stock", "kvcached"] * 2 + order]
    assert (
        found.samples["rest_seconds_stock"] == [PAUSE_SECONDS + 1.0] * 4
    )  # the warm-up, two growing rounds, and a profile
    assert "kvcached 32x(512+1)" in did and "kvcached 32x(16+256)" in did
    for phase in PHASES:
        assert found.samples[f"{phase}_tokens_per_second_kvcached"] == [99.0, 99.0]
        assert found.samples[f"{phase}_tokens_per_second_stock"] == [100.0, 100.0]
        for when in ("before", "after"):
            assert found.samples[f"{phase}_{when}_free_bytes_stock"] == [7, 7]
    assert set(found.profiles) == {f"{p}_{e}" for p in ("growing", "steady") for e in ("stock", "kvcached")}


def test_a_profile_that_fails_loses_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = played(monkeypatch, TimeoutError("no answer"))
    assert found.profiles["steady_stock"] == {"error": "no answer"}
    assert found.samples["steady_tokens_per_second_stock"] == [100.0, 100.0]


def test_the_threads_of_a_core_are_in_the_same_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpus.halves(tmp_path) == (frozenset(range(4)), frozenset(range(4, 8)))
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert cpus.halves(tmp_path) == (frozenset({0, 4, 1, 5}), frozenset({2, 6, 3, 7}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5})
    assert cpus.halves(tmp_path) is None


TWO_THREADS = (
    "import threading, time; threading.Thread(target=time.sleep, args=[60]).start(); print(flush=True);"
    "time.sleep(60)"
)


def test_all_threads_of_a_group_are_placed_and_others_are_not() -> None:
    ours = os.sched_getaffinity(0)
    command = [sys.executable, "-c", TWO_THREADS]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline()
            cpus.place(process.pid, {min(ours)})
            threads = [int(thread) for thread in os.listdir(f"/proc/{process.pid}/task")]
            assert len(threads) == 2
            assert [os.sched_getaffinity(thread) for thread in threads] == [{min(ours)}] * 2
            assert os.sched_getaffinity(0) == ours
        finally:
            process.kill()
    cpus.place(process.pid, ours)  # a process that has ended: no error


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
