"""The processes of benchmarks.sharing.two_gpus: a rank that it kills, and one that takes memory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sharing import deaths
from benchmarks.sharing.third_process import Outsider
from devkit.process_groups import members
from kvcached_core.ledger import Runtime
from kvcached_core.units import MIB


def test_seconds_are_those_until_a_condition_first_held() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 0.5

    found = deaths.first_seconds(
        {"early": lambda: now < 1, "late": lambda: now >= 2, "never": lambda: False}, 5.0, lambda: now, sleep
    )
    assert found == {"early": 0.0, "late": 2.0}


def test_a_rank_is_found_by_its_title_or_not_at_all() -> None:
    titles = {1: "VLLM::Worker_TP0", 2: "VLLM::Worker_TP1", 3: "VLLM::Worker_TP10", 4: "VLLM::EngineCore"}
    assert [deaths.rank_in(titles, rank) for rank in (0, 1, 10)] == [1, 2, 3]
    assert deaths.rank_in({5: "sglang::scheduler_TP1"}, 1) == 5
    for wrong in ({}, {2: "Worker_TP1", 3: "Worker_TP1"}):
        with pytest.raises(LookupError, match=f"{len(wrong)} processes are rank 1"):
            deaths.rank_in(wrong, 1)


ENGINE = """
(exec -a fake_TP0 sleep 100) & first=$!
(exec -a fake_TP1 sleep 100) & second=$!
echo ready
wait $second
kill $first
wait $first
exit 3
"""


@contextmanager
def fake_engine(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start two processes with the titles of ranks; when the second dies, the first ends."""
    script = folder / "engine.sh"
    script.write_text(ENGINE)
    with subprocess.Popen(
        ["bash", str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            for pid in members(process.pid):
                subprocess.run(["kill", "-9", str(pid)], check=False)


class Victim:
    name = "a"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.group = process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


def test_a_killed_rank_ends_its_engine_and_each_stage_is_timed(tmp_path: Path) -> None:
    with fake_engine(tmp_path) as process:

        def have_started() -> bool:
            titles = str(members(process.pid))
            return all(f"fake_TP{rank}" in titles for rank in (0, 1))

        assert deaths.first_seconds({"started": have_started}, 10.0)
        found = deaths.kill_rank(Victim(process), 1, Runtime.open(tmp_path / "run"), 10.0)
        assert found.keys() == {"slot_free", "ended", "gone", "clean"}
        assert process.returncode == 3


def test_another_process_holds_memory_until_it_is_told_to_leave() -> None:
    outsider = Outsider("host", {})
    outsider.take(8 * MIB)
    process: Any = outsider._process
    try:
        files = Path(f"/proc/{process.pid}/fd").iterdir()
        held = [512 * file.stat().st_blocks for file in files if "memfd:" in str(file.readlink())]
        assert held == [8 * MIB]
    finally:
        outsider.leave()
    assert process.returncode == 0
    outsider.leave()


def test_taking_more_memory_than_there_is_raises_an_error() -> None:
    outsider = Outsider("host", {})
    with pytest.raises(RuntimeError, match="took nothing and ended with status 1"):
        outsider.take(1 << 60)
    outsider.leave()
