"""Whether elastic vLLM says what stock vLLM says, on a GPU: growing, then full and evicting.

    python -m benchmarks.vllm_outputs --out benchmarks/results/vllm_outputs.json

bf16 results depend on what else is in a batch, in stock vLLM too. So two outputs agree if they are equal
up to a token at which the best two candidates are within `--gap` (a difference of log probabilities);
stock against stock is the control.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_rig
from benchmarks.record import write

Answer = list[tuple[int, float]]  # token, and how far the second best candidate is behind


def generate(options: argparse.Namespace) -> list[Answer]:
    """Run one engine over all rounds; later rounds share prefixes with earlier ones, some of them evicted."""
    from vllm import SamplingParams

    llm = gpu_rig.engine(
        options.backend, gpu_rig.model_folder(options.model), int(options.kv_gib * 2**30), {"spare": "64MiB"}
    )
    llm.collective_rpc("bench_randomize", args=(7, options.deviation))
    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=2, detokenize=False)
    answers: list[Answer] = []
    for number in range(options.rounds):
        shared = gpu_rig.prompts(1, 256, 1000 + number % 3)[0]["prompt_token_ids"]
        own = gpu_rig.prompts(options.requests, 300, 2000 + number)
        batch: list[Any] = [{"prompt_token_ids": shared + prompt["prompt_token_ids"]} for prompt in own]
        for output in llm.generate(batch, sampling, use_tqdm=False):
            completion = output.outputs[0]
            answers.append(
                [_choice(t, p) for t, p in zip(completion.token_ids, completion.logprobs, strict=True)]
            )
    return answers


def _choice(token: int, candidates: dict[int, Any]) -> tuple[int, float]:
    best = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)
    return token, float(best[0] - best[1])


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
    """Run stock, kvcached and stock again; write and judge."""
    started = time.time()
    runs: list[list[Answer]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, backend in enumerate(("stock", "kvcached", "stock")):
            part = Path(folder, f"{index}.json")
            command = [
                sys.executable,
                "-m",
                "benchmarks.vllm_outputs",
                "--backend",
                backend,
                "--part",
                str(part),
            ]
            command += ["--requests", str(options.requests), "--rounds", str(options.rounds)]
            command += ["--kv-gib", str(options.kv_gib), "--deviation", str(options.deviation)]
            options.logs.mkdir(parents=True, exist_ok=True)
            with (options.logs / f"outputs-{index}-{backend}.log").open("w") as log:
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
            runs.append([[(int(t), float(g)) for t, g in answer] for answer in json.loads(part.read_text())])
    elastic, control = first_differences(runs[0], runs[1]), first_differences(runs[0], runs[2])
    distinct = len({token for answer in runs[0] for token, _ in answer})
    samples = {
        "requests": [float(len(runs[0]))],
        "distinct_tokens": [float(distinct)],
        "gap_at_first_difference_kvcached": elastic or [0.0],
        "gap_at_first_difference_stock_again": control or [0.0],
        "different_kvcached": [float(len(elastic))],
        "different_stock_again": [float(len(control))],
    }
    write(options.out, sys.argv, samples, {}, started, {"gap_allowed": options.gap})
    worst = max(elastic, default=0.0)
    print(f"{len(runs[0])} answers, {distinct} distinct tokens; different from stock:")
    print(f"kvcached {len(elastic)}, largest gap {worst:.4f}")
    print(f"stock again {len(control)}, largest gap {max(control, default=0.0):.4f}")
    return 0 if worst <= options.gap and distinct > 100 else 1


def main() -> int:
    """Compare, or run one engine for a comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--backend", choices=gpu_rig.BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, default=Path("build/bench/llama-8b"))
    parser.add_argument("--logs", type=Path, default=Path("build/bench"))
    parser.add_argument("--requests", type=int, default=64, help="in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kv-gib", type=float, default=8.0)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--deviation", type=float, default=0.05, help="of the random weights")
    options = parser.parse_args()
    if options.backend is None:
        return compare(options)
    options.part.write_text(json.dumps(generate(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
