"""Run the whole suite, as `make test` does: `python -m tools.test_runs`.

Stages follow one another; the runs of a stage run at the same time. The first run of a stage writes to the
terminal. Each other run writes to a log, which is printed at the end of the stage. A failed run stops no
other run.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
VLLM, SGLANG = ".venv/bin/python", ".venv-sglang/bin/python"
SGLANG_TESTS = "tests/sglang tests/test_compat.py"
TOGETHER = "-n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder -m 'not alone and not engine'"
ENGINE = "-m engine --durations=25"
END_SECONDS = 60.0  # an interrupted run ends its engines within this


class Run(NamedTuple):
    """One run of pytest; `name` is the name of its report in build/."""

    name: str
    python: str
    options: str

    def command(self) -> list[str]:
        report = f"--junit-xml={BUILD / self.name}.xml"
        return [str(ROOT / self.python), "-m", "pytest", "-q", *shlex.split(self.options), report]


# An engine's start is mostly the work of one thread, so both engines' tests run well on two cores.
STAGES = (
    (Run("junit-vllm", VLLM, TOGETHER),),
    (Run("junit-sglang", SGLANG, f"{TOGETHER} {SGLANG_TESTS}"),),
    (Run("junit-alone", VLLM, "-m 'alone and not engine' --durations=10"),),
    (
        Run("junit-vllm-engine", VLLM, f"{ENGINE} tests/engine"),
        Run("junit-sglang-engine", SGLANG, f"{ENGINE} tests/sglang_engine"),
    ),
)
REPORTS = tuple(BUILD / f"{run.name}.xml" for stage in STAGES for run in stage)


def run_stage(stage: Sequence[Run]) -> list[str]:
    """Run the runs of a stage at the same time; returns the names of those that failed."""
    first, *others = stage
    begun = time.monotonic()
    print(f"== {', '.join(run.name for run in stage)}", flush=True)
    children: list[subprocess.Popen[bytes]] = []
    logs = [BUILD / f"{run.name}.log" for run in others]
    try:
        children.append(_start(first, None))
        for run, log in zip(others, logs, strict=True):
            with log.open("wb") as output:
                children.append(_start(run, output))
        statuses = [child.wait() for child in children]
    finally:
        _end(children)
    for log in logs:
        print(f"== {log.stem}", log.read_text(errors="replace"), sep="\n", flush=True)
    print(f"== {time.monotonic() - begun:.0f} s", flush=True)
    return [run.name for run, status in zip(stage, statuses, strict=True) if status]


def _start(run: Run, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start a run in its own session: Ctrl-C in the terminal must reach pytest only once, through _end()."""
    return subprocess.Popen(run.command(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                            start_new_session=True)  # fmt: skip


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt all running children, give them time to end their engines, and kill the rest."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.send_signal(signal.SIGINT)
    end = time.monotonic() + END_SECONDS
    for child in running:
        try:
            child.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def main() -> int:
    """Run all stages; exit status 1 if a run failed, 130 if interrupted."""
    # set explicitly: a shell may have started this program with a signal ignored
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    BUILD.mkdir(exist_ok=True)
    try:
        failed = [name for stage in STAGES for name in run_stage(stage)]
    except KeyboardInterrupt:
        return 130
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
