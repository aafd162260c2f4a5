"""The demo's judgement, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from examples.demo.load import Outcome, questions
from examples.demo.summary import Held, percentile, summarise, verdicts
from tools.wheels import ROOT

GOOD = Outcome("burst", 10, 0.2, 0.05)
MOVED = Held(
    start=1, peak=100, idle=60, before_limit=60, after_limit=30, lowered_limit=40, peak_after_lift=90, end=50
)


def processes(mark: str) -> list[str]:
    """Return the commands of living processes whose environment holds the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


def scratch_folders() -> set[str]:
    """Return the scratch folders of demos that exist now."""
    return {str(path) for path in Path("/dev/shm").glob("kvdemo-*")}


class Demo:
    """A demo that runs against the fake engine in a process of its own."""

    def __init__(self, build: Path, ignore: tuple[signal.Signals, ...] = ()) -> None:
        self.build = build
        self.mark = f"mark-{uuid.uuid4()}"
        self._before = scratch_folders()
        path = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "plugins/vllm_kvcached"))
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KVCACHED_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_demo", str(build)],
            env=environ | {"MARK": self.mark, "PYTHONPATH": path}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignore] and None,
        )  # fmt: skip

    def read_until(self, text: str) -> str:
        """Read what the demo prints up to a line that holds `text`."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
        raise AssertionError(f"{text!r} was never printed: {''.join(lines)}")

    def end(self) -> tuple[int, str]:
        """Wait for the end; returns the exit status and the rest of the output."""
        printed, _ = self.process.communicate(timeout=90)
        return self.process.returncode, printed

    def leftovers(self) -> list[str]:
        """Return processes that live on, and scratch folders made by this demo."""
        return processes(self.mark) + sorted(scratch_folders() - self._before)


@pytest.mark.slow
def test_the_demo_runs_shows_memory_moving_and_leaves_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "build")
    status, printed = demo.end()
    assert status == 0, printed
    assert demo.leftovers() == []
    summary = json.loads((demo.build / "summary.json").read_text())
    assert summary["failures"] == 0
    assert summary["requests"] == 72
    assert all(summary["verdicts"].values())
    held = summary["held_bytes"]
    assert held["after_limit"] <= held["lowered_limit"] < held["idle"] < held["peak"]
    assert (demo.build / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "kvctl limit demo" in printed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", ["starting vllm serve", "burst 1", "kvctl limit demo", "burst 3"])
def test_an_interrupt_at_any_point_leaves_no_process_and_no_file(
    tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    demo = Demo(tmp_path / "build")
    demo.read_until(moment)
    demo.process.send_signal(number)
    status, printed = demo.end()
    assert status == 130, printed
    assert demo.leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_is_heard_where_the_shell_ignores_it(tmp_path: Path, number: signal.Signals) -> None:
    demo = Demo(tmp_path / "build", ignore=(signal.SIGINT, signal.SIGTERM))
    demo.read_until("burst 1")
    demo.process.send_signal(number)
    status, printed = demo.end()
    assert status == 130, printed
    assert demo.leftovers() == []


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert percentile([7.0], 50) == 7


def test_a_good_run_is_judged_good() -> None:
    assert all(verdict.holds for verdict in verdicts([GOOD], MOVED))


@pytest.mark.parametrize(
    ("outcomes", "held"),
    [
        ([GOOD, GOOD._replace(error="status 500")], MOVED),
        ([], MOVED),
        ([GOOD], MOVED._replace(peak=1, idle=0)),
        ([GOOD], MOVED._replace(idle=100)),
        ([GOOD], MOVED._replace(after_limit=41)),
        ([GOOD], MOVED._replace(before_limit=40)),
        ([GOOD], MOVED._replace(peak_after_lift=40, end=0)),
        ([GOOD], MOVED._replace(end=90)),
    ],
)
def test_memory_that_did_not_move_or_a_failed_request_is_judged_bad(
    outcomes: list[Outcome], held: Held
) -> None:
    assert sum(not verdict.holds for verdict in verdicts(outcomes, held)) == 1


def test_the_summary_counts_failures_and_times_successes_only() -> None:
    slow = GOOD._replace(ttft_seconds=9.0, error="status 500")
    summary = summarise([GOOD, slow], MOVED, 1.0)
    assert (summary["requests"], summary["failures"], summary["output_tokens"]) == (2, 1, 10)
    assert summary["ttft_seconds"] == {"p50": 0.2, "p90": 0.2, "p99": 0.2}
    assert summary["errors"] == ["status 500"]


def test_requests_share_system_prompts_and_nothing_else() -> None:
    requests = questions(24, 1, 8)
    assert len({request.system for request in requests}) == 4
    assert len({request.question for request in requests}) == 24
