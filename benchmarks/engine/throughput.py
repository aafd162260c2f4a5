"""Compare throughput and free memory of a stock and an elastic engine, each alone on the GPU.

    python -m benchmarks.engine.throughput --engine vllm --out benchmarks/results/vllm_throughput.json

Each run is its own process. The order is stock, kvcached, kvcached, stock, so that slow drift of the machine
affects both. Rounds grow from no memory, are full, or are steady (the memory is mapped already).
Arguments after `--` go to vllm_rounds or sglang_rounds in this folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import options as options_of
from benchmarks.lib.record import Ratio, write

PHASES = ("growing", "full", "steady")
ORDER = ("stock", "kvcached", "kvcached", "stock")
MEMORY = "free_"  # prefix of the samples of free memory; there is one for each rank


def measure(engine: str, backend: str, out: Path, more: list[str], log: Path) -> dict[str, Any]:
    """Run one engine; raises CalledProcessError if it fails."""
    rounds = f"benchmarks.engine.{engine}_rounds"
    command = [sys.executable, "-m", rounds, "--backend", backend, "--out", str(out), *more]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)
    seen: dict[str, Any] = json.loads(out.read_text())
    return seen


def collect(seen: list[tuple[str, dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the samples of all runs by the names of measurement and backend."""
    samples: dict[str, list[float]] = {}
    for backend, run in seen:
        memory = [name for name in run if name.startswith(MEMORY)]
        for name in (*PHASES, *memory, "load_seconds"):
            values = run[name] if isinstance(run[name], list) else [run[name]]
            unit = "_tokens_per_second" if name in PHASES else ""
            samples.setdefault(f"{name}{unit}_{backend}", []).extend(values)
    return samples


def main() -> None:
    """Run all engines, write the JSON and print the ratios."""
    parser = options_of.parser("engine.throughput", __doc__)
    options_of.add_engine(parser)
    parser.add_argument("--logs", type=Path, default=Path("build/bench"))
    parser.add_argument("--order", nargs="+", default=ORDER)
    options_of.add_settings(parser)
    options_of.add_ranks(parser)
    parser.add_argument("more", nargs="*", help="arguments of the rounds, after --")
    options = parser.parse_args()
    started = time.time()
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        for index, backend in enumerate(options.order):
            log = options.logs / f"throughput-{index}-{backend}.log"
            out = Path(folder) / f"{index}.json"
            more = [*options.more, f"--tensor-parallel={options.tensor_parallel}",
                    *(f"--option={pair}" for pair in options.option)]  # fmt: skip
            seen.append((backend, measure(options.engine, backend, out, more, log)))
            print(f"{time.time() - started:6.0f} s  {backend}: {seen[-1][1]}", flush=True)
    samples = collect(seen)
    rate = "tokens_per_second"
    ratios = {phase: Ratio(f"{phase}_{rate}_kvcached", f"{phase}_{rate}_stock") for phase in PHASES}
    write(options.out, sys.argv, samples, ratios, started, {"order": list(options.order)})
    print(json.dumps(json.loads(options.out.read_text())["ratios"], indent=1))


if __name__ == "__main__":
    main()
