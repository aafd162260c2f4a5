"""The demo's verdicts, and its end: it leaves no process and no file behind, also after an interrupt."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import uuid
from itertools import product
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from devkit.processes import INTERRUPTS
from devkit.statistics import percentile
from examples.demo import server
from examples.demo.load import Outcome, questions
from examples.demo.memory import Bytes, Sample
from examples.demo.summary import Held, Run, summarise, verdicts
from examples.demo.view import BAR_CELLS, bars
from kvcached_core.units import MIB
from tools.wheels import ROOT

pytestmark = pytest.mark.alone

GOOD = Outcome("a", 10, 0.2, 0.05)
HELD = Held(
    start=1, peak=90, peak_used=60, idle=50, least_beside=20, before_limit=50, after_limit=30,
    peak_together=60, end=20,
)  # fmt: skip
MOVED = Run([GOOD, GOOD._replace(engine="b")], {"a": HELD, "b": HELD}, {"b": 40}, 100)


def changed(name: str, **held: int) -> Run:
    """Return the good run with changed byte counts for one engine."""
    return MOVED._replace(held={**MOVED.held, name: HELD._replace(**held)})


def processes(mark: str) -> list[str]:
    """Return the command lines of living processes whose environment contains `mark`."""
    found = psutil.process_iter(["environ", "cmdline"])
    return [str(one.info["cmdline"]) for one in found if mark in (one.info["environ"] or {}).values()]


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
        # the shell ignores these signals, and so does the program that it executes
        shell = ["sh", "-c", 'for each in $0; do trap "" "$each"; done; exec "$@"']
        ignored = " ".join(number.name.removeprefix("SIG") for number in ignore)
        self.process = subprocess.Popen(
            [*shell, ignored, sys.executable, "-m", "tests.fake_demo", str(build)],
            env=environ | {"MARK": self.mark, "PYTHONPATH": path}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    assert all(summary["verdicts"].values())
    a, b = summary["engines"].values()
    assert (a["requests"], b["requests"]) == (32, 44)
    assert min(a["held_bytes"]["peak_used"], b["held_bytes"]["peak_used"]) > summary["budget_bytes"] / 2
    assert a["held_bytes"]["least_beside"] < a["held_bytes"]["idle"]
    lowered = summary["lowered_limit_bytes"]["smollm2-b"]
    assert b["held_bytes"]["after_limit"] <= lowered < b["held_bytes"]["before_limit"]
    assert (demo.build / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "kvctl limit smollm2-b 56MiB" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *product(("start on one budget", "smollm2-a, alone", "kvctl limit"), (signal.SIGINT, signal.SIGTERM)),
        *(("both at once", number) for number in INTERRUPTS),
    ],
)
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
def test_an_interrupt_works_where_the_shell_ignores_it(tmp_path: Path, number: signal.Signals) -> None:
    demo = Demo(tmp_path / "build", ignore=(signal.SIGINT, signal.SIGTERM))
    demo.read_until("smollm2-a, alone")
    demo.process.send_signal(number)
    status, printed = demo.end()
    assert status == 130, printed
    assert demo.leftovers() == []


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert [percentile(values, p) for p in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert percentile([7.0], 50) == 7


def test_a_good_run_is_judged_good() -> None:
    assert all(verdict.holds for verdict in verdicts(MOVED))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (MOVED._replace(outcomes=[GOOD, GOOD._replace(error="status 500")]), "all requests succeeded"),
        (MOVED._replace(outcomes=[]), "all requests succeeded"),
        (changed("a", peak_used=50), "a used more than half of the budget"),
        (changed("b", peak_used=50), "b used more than half of the budget"),
        (changed("a", peak=50), "a went down when idle"),
        (changed("b", idle=90), "b went down when idle"),
        (changed("a", least_beside=50), "a gave its cache back to the other"),
        (changed("b", after_limit=41), "b went down below its lowered limit"),
        (changed("b", before_limit=40), "b went down below its lowered limit"),
        (changed("b", peak_together=40), "b grew again when it was lifted"),
    ],
)
def test_memory_that_did_not_move_or_a_failed_request_is_judged_bad(run: Run, sentence: str) -> None:
    assert [verdict.text for verdict in verdicts(run) if not verdict.holds] == [sentence]


def test_the_summary_counts_failures_and_times_successes_only_for_each_engine() -> None:
    slow = GOOD._replace(ttft_seconds=9.0, error="status 500")
    summary = summarise(MOVED._replace(outcomes=[GOOD, slow, GOOD._replace(engine="b")]), 1.0)
    assert (summary["requests"], summary["failures"]) == (3, 1)
    engine = summary["engines"]["a"]
    assert (engine["requests"], engine["failures"], engine["output_tokens"]) == (2, 1, 10)
    assert engine["ttft_seconds"] == {"p50": 0.2, "p90": 0.2, "p99": 0.2}
    assert engine["errors"] == ["status 500"]
    assert summary["engines"]["b"]["failures"] == 0


def test_bars_have_one_length_fit_a_narrow_terminal_and_show_all_held_memory() -> None:
    engines = {
        "smollm2-a": Bytes(5 * MIB, 5 * MIB, 5 * MIB, limit=144 * MIB),
        "smollm2-b": Bytes(43 * MIB, 43 * MIB, 43 * MIB, limit=72 * MIB),
    }
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(bars(Sample(0.0, engines, 144 * MIB)))
    first, second, whole, legend = captured.get().splitlines()
    assert "15 MiB" in first and "129 MiB" in second and "144 MiB of 144 MiB" in whole
    begins = first.index("█")
    assert second[begins + BAR_CELLS // 2] == "|" != first[begins + BAR_CELLS // 2]
    shown = [line[begins : begins + BAR_CELLS] for line in (first, second, whole)]
    assert sum(map(shown[0].count, "█▓░")) == pytest.approx(BAR_CELLS * 15 / 144, abs=0.5)
    assert sum(map(shown[1].count, "█▓░|")) == pytest.approx(BAR_CELLS * 129 / 144, abs=0.5)
    assert shown[2].count("█") == sum(map(shown[0].count, "█▓░"))
    assert set(shown[2]) == set("█▓")
    assert "limit" in legend


def test_requests_share_system_prompts_and_nothing_else() -> None:
    requests = questions(24, 1, 8)
    assert len({request.system for request in requests}) == 4
    assert len({request.question for request in requests}) == 24


@pytest.mark.parametrize(
    ("asked", "kinds", "title"),
    [
        ("", ("vllm", "vllm"), "Two vLLM servers"),
        ("sglang,sglang", ("sglang", "sglang"), "Two SGLang servers"),
        ("vllm, sglang", ("vllm", "sglang"), "vLLM and SGLang, one server each,"),
    ],
)
def test_the_engines_are_those_asked_for(asked: str, kinds: tuple[str, ...], title: str) -> None:
    engines = server.make_engines(server.parse_kinds(asked))
    assert tuple(engine.kind for engine in engines) == kinds
    assert server.title(engines) == title
    for engine in engines:
        words = [str(word) for word in server.command(Path("model"), engine)]
        assert ("sglang.launch_server" in words) == (engine.kind == "sglang")
        assert words[words.index("--kv-cache-backend") + 1] == "kvcached"
        assert words[words.index("--port") + 1] == str(engine.port)


@pytest.mark.parametrize("asked", ["vllm", "vllm,vllm,vllm", "vllm,llama"])
def test_other_engines_are_refused(asked: str) -> None:
    with pytest.raises(server.DemoError, match="expected two of vllm, sglang"):
        server.parse_kinds(asked)
