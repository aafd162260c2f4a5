"""Compare an elastic engine's answers with the stock engine's on a GPU, while the cache grows and evicts.

    python -m benchmarks.engine.outputs --engine vllm --out benchmarks/results/vllm_outputs.json

In bf16 an answer depends on the other requests of its batch, in stock engines too. So two answers agree if
they are equal, or if the log probabilities of the two best candidates differ by at most `--gap` at the first
different token. A second stock run is the control. The exit status is 1 if an elastic answer differs by more
than the gap.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lib import options as options_of
from benchmarks.lib import vllm_engine
from benchmarks.lib.record import write

Answer = list[tuple[int, float]]  # (token, its log probability less that of the second best candidate)


def rounds_of_prompts(options: argparse.Namespace) -> Iterator[list[list[int]]]:
    """Yield the prompts of each round. Later prompts share prefixes with earlier ones; some are evicted."""
    for number in range(options.rounds):
        (shared,) = _ids(1, 256, 1000 + number % 3)
        yield [shared + own for own in _ids(options.requests, 300, 2000 + number)]


def _ids(count: int, length: int, seed: int) -> list[list[int]]:
    return [prompt["prompt_token_ids"] for prompt in vllm_engine.prompts(count, length, seed)]


def settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the kvcached settings; settings on the command line replace the defaults."""
    return {"spare": "64MiB"} | options_of.settings(options)


def first_differences(reference: list[Answer], other: list[Answer]) -> list[float]:
    """Return, for each pair that differs, the reference's gap at the first different token."""
    gaps = []
    for mine, theirs in zip(reference, other, strict=True):
        for (token, gap), (there, _) in zip(mine, theirs, strict=True):
            if token != there:
                gaps.append(gap)
                break
    return gaps


def compare(options: argparse.Namespace) -> int:
    """Run kvcached, then stock twice; write the result and return the exit status."""
    started = time.time()
    runs: list[list[Answer]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, backend in enumerate(("kvcached", "stock", "stock")):
            part = Path(folder, f"{index}.json")
            command = [sys.executable, "-m", "benchmarks.engine.outputs", "--engine", options.engine]
            command += ["--backend", backend, "--part", str(part), "--model", str(options.model)]
            command += ["--requests", str(options.requests), "--rounds", str(options.rounds)]
            command += ["--kv-gib", str(options.kv_gib), "--deviation", str(options.deviation)]
            command += ["--tensor-parallel", str(options.tensor_parallel)]
            command += [f"--option={pair}" for pair in options.option]
            options.logs.mkdir(parents=True, exist_ok=True)
            with (options.logs / f"outputs-{index}-{backend}.log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
            runs.append([[(int(t), float(g)) for t, g in answer] for answer in json.loads(part.read_text())])
    elastic, control = first_differences(runs[1], runs[0]), first_differences(runs[1], runs[2])
    distinct = len({token for answer in runs[1] for token, _ in answer})
    samples = {
        "requests": [float(len(runs[1]))],
        "distinct_tokens": [float(distinct)],
        "gap_at_first_difference_kvcached": elastic or [0.0],
        "gap_at_first_difference_stock_again": control or [0.0],
        "different_kvcached": [float(len(elastic))],
        "different_stock_again": [float(len(control))],
    }
    write(options.out, sys.argv, samples, {}, started, {"gap_allowed": options.gap})
    worst = max(elastic, default=0.0)
    print(f"{len(runs[1])} answers, {distinct} distinct tokens; different from stock:")
    print(f"kvcached {len(elastic)}, largest gap {worst:.4f}")
    print(f"stock again {len(control)}, largest gap {max(control, default=0.0):.4f}")
    return 0 if worst <= options.gap and distinct > 100 else 1


def main() -> int:
    """Compare, or run one engine for a comparison."""
    parser = options_of.parser("engine.outputs", __doc__, required=False)
    options_of.add_engine(parser)
    parser.add_argument("--backend", choices=vllm_engine.BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, default=Path("build/bench/llama-8b"))
    parser.add_argument("--logs", type=Path, default=Path("build/bench"))
    parser.add_argument("--requests", type=int, default=64, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=6)
    options_of.add_kv_gib(parser, 8.0)
    options_of.add_ranks(parser)
    parser.add_argument("--gap", type=float, default=0.01, help="tolerated difference of log probabilities")
    parser.add_argument("--deviation", type=float, default=0.05, help="deviation of the random weights")
    options_of.add_settings(parser)
    options = parser.parse_args()
    if options.backend is None:
        return compare(options)
    module = importlib.import_module(f"benchmarks.engine.{options.engine}_outputs")
    options.part.write_text(json.dumps(module.generate(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
