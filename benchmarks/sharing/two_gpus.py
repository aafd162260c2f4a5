"""Check tensor parallelism on two GPUs: answers, throughput, and how engines share both devices.

    python -m benchmarks.sharing.two_gpus --engine vllm --out benchmarks/results/two_gpus_vllm.json

The steps `outputs` and `throughput` run the benchmarks of these names with two ranks. The step `sharing` runs
scenes: another process takes 20 GiB of device 1 only, and ends; two engines of two ranks have bursts in turn;
one rank of an engine is killed, and the engine's end is compared with a stock engine's end; an engine of two
ranks and two engines of one rank have bursts in turn. The exit status is 1 if a step or a check failed.
Without a GPU (or with `--host --model FOLDER`) only the scenes run, with small sizes and one ledger. `--steps
sharing` runs one step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib import engines
from benchmarks.lib import options as options_of
from benchmarks.lib.record import Ratio, print_checks, write
from benchmarks.lib.runtime import own_runtime
from benchmarks.sharing import two_gpus_scenes
from benchmarks.sharing.one_gpu import SERIES_SECONDS, play
from benchmarks.sharing.two_gpus_scenes import RANKS, Pairs
from kvcached_core.units import GIB

GOAL = 0.99  # share of stock's throughput
KEPT_BYTES = GIB // 2  # on each device an idle engine may hold this much more than before its first round
STEPS = ("outputs", "throughput", "sharing")
# Half of the default sizes, because each of two ranks holds half of a token's bytes.
ARGUMENTS = {
    "outputs": [f"--tensor-parallel={RANKS}", "--kv-gib=4"],
    "throughput": [f"--tensor-parallel={RANKS}", "--", "--kv-gib=12"],
}


@dataclass
class Result:
    """The findings of all steps."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, step: str, found: Mapping[str, Any]) -> None:
        """Add a benchmark's result; the step's name is put before each sample's name."""
        self.samples |= {f"{step}_{name}": values for name, values in found["samples"].items()}
        for name, claim in found["ratios"].items():
            above, below = (f"{step}_{claim[which]}" for which in ("numerator", "denominator"))
            self.ratios[f"{step}_{name}"] = Ratio(above, below, claim["statistic"])
            self.checks[f"{step}, {name}: {GOAL} of stock's"] = claim["value"] >= GOAL
        self.notes[f"{step}_notes"] = found["notes"]

    def check_memory(self) -> None:
        """Check that the free memory of each device returns to its value before the rounds."""
        for rank in range(RANKS):
            suffix = f"_rank{rank}_kvcached" if rank else "_kvcached"
            idle, after = (
                self.samples[f"throughput_free_{name}_bytes{suffix}"] for name in ("idle", "after")
            )
            self.checks[f"the memory of device {rank} came back"] = min(after) >= min(idle) - KEPT_BYTES

    def save(self, path: Path, started: float) -> None:
        """Write the result as JSON."""
        write(path, sys.argv, self.samples, self.ratios, started, {"checks": self.checks, **self.notes})


def run_benchmark(step: str, engine: str, logs: Path, result: Result) -> None:
    """Run a benchmark with two ranks, and add its result."""
    out = logs / f"{step}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.engine.{step}", "--engine", engine, "--out", str(out)]
    status = subprocess.run([*command, "--logs", str(logs), *ARGUMENTS[step]], check=False).returncode
    result.checks[f"{step} ended with success"] = status == 0
    if out.exists():
        result.take(step, json.loads(out.read_text()))
        if step == "throughput":
            result.check_memory()


def run_scenes(options: argparse.Namespace, result: Result, started: float) -> None:
    """Run the scenes in a runtime directory of their own."""

    def save(stage: Pairs) -> None:
        result.samples |= stage.watch.series("abxy", SERIES_SECONDS) | stage.samples
        result.checks |= stage.checks | {f"scene played: {name}": False for name in stage.failures}
        result.notes |= {"events": stage.watch.events, "failures": stage.failures, "ends": stage.ends,
                         "unit_bytes": stage.scale.gib}  # fmt: skip
        result.save(options.out, started)

    with own_runtime() as runtime:
        scale = engines.scale(options.host, options.model, options.engine)
        stage = Pairs(scale, options.logs, runtime, options.most_seconds, options.engine)
        try:
            play(stage, save, two_gpus_scenes.SCENES)
        finally:
            stage.third.leave()


def require_devices(host: bool, steps: Iterable[str]) -> None:
    """Raise SystemExit if this machine lacks the devices for these steps."""
    if host and set(steps) != {"sharing"}:
        raise SystemExit("outputs and throughput need GPUs: --steps sharing, or no --host")
    if host:
        return
    listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True).stdout
    if (count := listed.count("UUID: GPU-")) < RANKS:
        raise SystemExit(f"{RANKS} GPUs are needed, {count} were found: --host plays the scenes on the CPU")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = options_of.parser("sharing.two_gpus", __doc__)
    options_of.add_engine(parser)
    options_of.add_engines(parser, "two_gpus")
    parser.add_argument("--steps", nargs="+", choices=STEPS)
    options_of.add_time_limit(parser, 1200.0)
    options = parser.parse_args()
    options.steps = options.steps or (["sharing"] if options.host else list(STEPS))
    return options


def main() -> int:
    """Run the steps, write the result after each, and print the checks."""
    options = arguments()
    require_devices(options.host, options.steps)
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no multicast
    options.logs.mkdir(parents=True, exist_ok=True)
    started, result = time.time(), Result()
    for step in options.steps:
        if step == "sharing":
            run_scenes(options, result, started)
        else:
            run_benchmark(step, options.engine, options.logs, result)
            result.save(options.out, started)
    return print_checks(result.checks)


if __name__ == "__main__":
    sys.exit(main())
