"""benchmarks.sharing.two_gpus: its samples and checks, with fake engines on simulated devices."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.engine.rounds import Rounds
from benchmarks.engine.throughput import collect
from benchmarks.sharing import two_gpus_scenes
from benchmarks.sharing.two_gpus import Result
from kvcached_core.units import GIB

ROOM, TAKEN = 64, 16  # units of one byte


class FakeRounds(Rounds):
    def start(self, kv_bytes: int, settings: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        return len(prompts) * tokens

    def free_bytes(self) -> list[int]:
        return [7, 5]


def test_the_free_memory_of_each_device_is_a_sample_of_its_own() -> None:
    rounds = FakeRounds(SimpleNamespace(option=[], kv_gib=1.0))  # type: ignore[arg-type]
    rounds.look("free_idle_bytes")
    rounds.look("free_idle_bytes")
    run = rounds.seen | {name: [1.0] for name in ("growing", "full", "steady")}
    samples = collect([("stock", run), ("kvcached", run)])
    assert samples["free_idle_bytes_stock"] == [7, 7]
    assert samples["free_idle_bytes_rank1_kvcached"] == [5, 5]
    assert samples["growing_tokens_per_second_stock"] == [1.0]


class Fake:
    """A stage with fake engines of two ranks, which share two simulated devices."""

    def __init__(self, **faults: Any) -> None:
        self.faults = faults
        self.scale = SimpleNamespace(gib=1, on_host=False)
        self.ranks_on_a_device, self.taken, self.error_units = 1, 0, 1.5
        self.samples: dict[str, list[float]] = {}
        self.checks: dict[str, bool] = {}
        self.ends: dict[str, int | None] = {}
        self.content: dict[str, int] = {}
        self.peaks: dict[str, float] = {}
        self.watch = SimpleNamespace(moments=[SimpleNamespace(at=0.0)], note=lambda text: None)
        self.third = SimpleNamespace(take=self._take, leave=lambda: self._take(0))

    def _take(self, size_bytes: int) -> None:
        self.taken = size_bytes

    def start(self, name: str) -> None:
        self.content[name] = 0

    def ready(self, name: str) -> None: ...

    def room_units(self) -> float:
        return ROOM

    def flush(self, name: str) -> None:
        self.content[name] = 0

    def full_bytes(self, name: str, when: str) -> int:
        self._grow(name, ROOM)
        return self.content[name] - (self.faults.get("stays", 0) if when == "after_third" else 0)

    def _grow(self, name: str, size_bytes: float) -> None:
        """Grow up to the memory of the fuller device; other engines give up cached memory for it."""
        bound = ROOM - (0 if "blind" in self.faults else self.taken)
        others = sum(size for other, size in self.content.items() if other != name)
        if "holds" in self.faults:
            bound -= others
        self.content[name] = int(min(size_bytes, bound))
        for other in self.content:
            if other != name and "holds" not in self.faults:
                self.content[other] = int(min(self.content[other], bound - self.content[name]))
        self.peaks[name] = self.content[name]

    def free(self, when: str) -> list[int]:
        held = sum(self.content.values())
        return [ROOM - held, ROOM - held - self.taken]

    def burst(self, name: str, units: float) -> Future[dict[str, Any]]:
        self._grow(name, units)
        asked: Future[dict[str, Any]] = Future()
        asked.set_result({"failed": self.faults.get("failed", 0)})
        return asked

    def end(self, name: str, asked: Future[dict[str, Any]], what: str) -> dict[str, Any]:
        return asked.result()

    def peak(self, name: str, since: float) -> float:
        return self.peaks[name]

    def ranks(self, name: str) -> list[Any]:
        return [SimpleNamespace(ready_bytes=self.content[name])]


def broken(stage: Any) -> list[str]:
    return [what for what, holds in stage.checks.items() if not holds]


def test_a_third_process_bounds_an_engine_until_it_leaves() -> None:
    stage: Any = Fake()
    two_gpus_scenes.third_process(stage)
    assert len(stage.checks) == 4 and not broken(stage)
    assert stage.samples["a_content_bytes"] == [ROOM, ROOM - TAKEN, ROOM]
    assert stage.samples["third_bytes"] == [TAKEN]


@pytest.mark.parametrize(
    ("faults", "what"),
    [
        ({"blind": True}, "A's budget was the least of both devices"),
        ({"stays": 4}, "A grew back when the third process had left"),
        ({"failed": 1}, "requests went on beside the third process"),
    ],
)
def test_a_fault_beside_a_third_process_fails_its_check(faults: dict[str, Any], what: str) -> None:
    stage: Any = Fake(**faults)
    two_gpus_scenes.third_process(stage)
    assert broken(stage) == [what]


@pytest.mark.parametrize(
    ("faults", "what"),
    [
        ({}, []),
        ({"holds": True}, ["x: each had most of the memory in its turn"]),
        ({"failed": 1}, ["x: all requests ended"]),
    ],
)
def test_bursts_in_turn_show_whether_memory_moves(faults: dict[str, Any], what: list[str]) -> None:
    stage: Any = Fake(**faults)
    for name in "ab":
        stage.start(name)
    two_gpus_scenes.in_turn(stage, "ab", "x")
    assert broken(stage) == what and len(stage.checks) == 2
    assert all(len(stage.samples[f"{name}_x_peak_bytes"]) == two_gpus_scenes.ROUNDS for name in "ab")


GOOD_END = {"slot_free": 0.2, "ended": 3.0, "gone": 3.5, "clean": 3.9}


@pytest.mark.parametrize(
    ("changes", "status", "what"),
    [
        ({}, 1, []),
        ({}, 0, ["a ended as stock, all its processes with it"]),
        ({"ended": 7.1, "gone": 7.2}, 1, ["a ended as stock, all its processes with it"]),
        ({"slot_free": 1.5}, 1, ["the slot of a's killed rank was free within a second"]),
        ({"clean": 4.6}, 1, ["all ledgers were clean within a second of a's end"]),
    ],
)
def test_an_engines_end_is_compared_with_the_stock_engines_end(
    changes: dict[str, float], status: int, what: list[str]
) -> None:
    stage: Any = Fake()
    stage.samples["stock_ended_seconds"], stage.ends = [2.0], {"stock": 1, "a": status}
    two_gpus_scenes.check_end(stage, "a", GOOD_END | changes)
    assert broken(stage) == what and len(stage.checks) == 3


def test_an_engine_that_never_ends_fails_every_check_of_its_end() -> None:
    stage: Any = Fake()
    stage.ends = {"stock": None, "a": None}
    two_gpus_scenes.check_end(stage, "a", {})
    assert len(broken(stage)) == 3


@pytest.mark.parametrize(("visible", "wanted"), [("", ["0", "1"]), ("3, GPU-5", ["3", "GPU-5"])])
def test_a_device_is_chosen_among_the_visible_ones(visible: str, wanted: list[str]) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible}
    assert [two_gpus_scenes.only(device, environ)["CUDA_VISIBLE_DEVICES"] for device in (0, 1)] == wanted


def throughput(value: float, after: float) -> dict[str, Any]:
    samples = {"rate_stock": [1.0], "rate_kvcached": [value]}
    for suffix in ("_kvcached", "_rank1_kvcached"):
        samples |= {f"free_idle_bytes{suffix}": [50.0 * GIB], f"free_after_bytes{suffix}": [50.0 * GIB]}
    samples["free_after_bytes_rank1_kvcached"] = [50.0 * GIB, after]
    claim = {"numerator": "rate_kvcached", "denominator": "rate_stock", "statistic": "median", "value": value}
    return {"samples": samples, "ratios": {"full": claim}, "notes": {"order": []}}


@pytest.mark.parametrize(
    ("value", "after", "what"),
    [
        (0.99, 49.9 * GIB, []),
        (0.98, 49.9 * GIB, ["throughput, full: 0.99 of stock's"]),
        (1.0, 48.0 * GIB, ["the memory of device 1 came back"]),
    ],
)
def test_throughput_is_compared_with_the_goal_and_memory_with_its_beginning(
    value: float, after: float, what: list[str]
) -> None:
    result = Result()
    result.take("throughput", throughput(value, after))
    result.check_memory()
    assert broken(result) == what and len(result.checks) == 3
    assert result.ratios["throughput_full"].numerator == "throughput_rate_kvcached"
    assert result.notes == {"throughput_notes": {"order": []}}
