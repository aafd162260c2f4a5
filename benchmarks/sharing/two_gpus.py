"""Tensor parallelism on two GPUs: outputs and throughput against stock, and what engines do to each other.

    python -m benchmarks.sharing.two_gpus --engine vllm --out benchmarks/results/two_gpus_vllm.json

`outputs` and `throughput` are benchmarks of those names with two ranks. `sharing` plays scenes: another
process takes 20 GiB of device 1 only and leaves; two engines of two ranks have bursts in turn; one rank of
one is killed, as one of a stock engine was before; one of two ranks and two of one have bursts in turn. The
exit status is 1 if a step or a check failed. Without a GPU (or with `--host --model FOLDER`) only the scenes
are played, small, in one ledger. A step may be run alone: `--steps sharing`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib import engines
from benchmarks.lib.record import Ratio, write
from benchmarks.sharing import two_gpus_scenes
from benchmarks.sharing.one_gpu import SERIES_SECONDS, play
from benchmarks.sharing.two_gpus_scenes import RANKS, Pairs
from kvcached_core.ledger import Runtime
from kvcached_core.units import GIB

GOAL = 0.99  # of stock's throughput
KEPT_BYTES = GIB // 2  # of a device: what an engine at rest may hold more than before its first round
STEPS = ("outputs", "throughput", "sharing")
# Half of the defaults' bytes: two ranks share what a token takes.
ARGUMENTS = {
    "outputs": [f"--tensor-parallel={RANKS}", "--kv-gib=4"],
    "throughput": [f"--tensor-parallel={RANKS}", "--", "--kv-gib=12"],
}


@dataclass
class Result:
    """What all steps found."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def take(self, step: str, found: Mapping[str, Any]) -> None:
        """Add what a benchmark has written, its names behind the step's."""
        self.samples |= {f"{step}_{name}": values for name, values in found["samples"].items()}
        for name, claim in found["ratios"].items():
            above, below = (f"{step}_{claim[which]}" for which in ("numerator", "denominator"))
            self.ratios[f"{step}_{name}"] = Ratio(above, below, claim["statistic"])
            self.checks[f"{step}, {name}: {GOAL} of stock's"] = claim["value"] >= GOAL
        self.notes[f"{step}_notes"] = found["notes"]

    def check_memory(self) -> None:
        """Check that what is free on each device comes back to what was free before the rounds."""
        for rank in range(RANKS):
            suffix = f"_rank{rank}_kvcached" if rank else "_kvcached"
            idle, after = (
                self.samples[f"throughput_free_{name}_bytes{suffix}"] for name in ("idle", "after")
            )
            self.checks[f"the memory of device {rank} came back"] = min(after) >= min(idle) - KEPT_BYTES

    def save(self, path: Path, started: float) -> None:
        """Write all as JSON."""
        write(path, sys.argv, self.samples, self.ratios, started, {"checks": self.checks, **self.notes})


def run_benchmark(step: str, engine: str, logs: Path, result: Result) -> None:
    """Run a benchmark with two ranks, and take what it wrote."""
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
    """Play the scenes in a ledger of their own."""

    def save(stage: Pairs) -> None:
        result.samples |= stage.watch.series("abxy", SERIES_SECONDS) | stage.samples
        result.checks |= stage.checks | {f"scene played: {name}": False for name in stage.failures}
        result.notes |= {"events": stage.watch.events, "failures": stage.failures, "ends": stage.ends,
                         "unit_bytes": stage.scale.gib}  # fmt: skip
        result.save(options.out, started)

    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvcached-bench-") as folder:
        os.environ["KVCACHED_RUNTIME_DIR"] = folder
        scale = engines.scale(options.host, options.model, options.engine)
        stage = Pairs(scale, options.logs, Runtime.open(folder), options.most_seconds, options.engine)
        try:
            play(stage, save, two_gpus_scenes.SCENES)
        finally:
            stage.third.leave()


def require_devices(host: bool, steps: Iterable[str]) -> None:
    """Raise SystemExit where the steps cannot be run."""
    if host and set(steps) != {"sharing"}:
        raise SystemExit("outputs and throughput need GPUs: --steps sharing, or no --host")
    if host:
        return
    listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True).stdout
    if (count := listed.count("UUID: GPU-")) < RANKS:
        raise SystemExit(f"{RANKS} GPUs are needed, {count} were found: --host plays the scenes on the CPU")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=tuple(engines.CHILDREN), default="vllm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", choices=STEPS)
    parser.add_argument("--host", action="store_true", default=not engines.has_gpu(), help="on the CPU")
    parser.add_argument("--model", type=Path, help="of the scenes; default: one is made, as Llama-8B")
    parser.add_argument("--logs", type=Path, default=Path("build/bench/two_gpus"))
    parser.add_argument("--most-seconds", type=float, default=1200.0, help="for the scenes")
    options = parser.parse_args()
    options.steps = options.steps or (["sharing"] if options.host else list(STEPS))
    return options


def main() -> int:
    """Run the steps, write after each, and print the checks."""
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
    for what, holds in result.checks.items():
        print(f"{'yes' if holds else 'NO '}  {what}")
    return 0 if all(result.checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
