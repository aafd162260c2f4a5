"""One engine, several rounds; writes what it saw as JSON. Run by vllm_throughput, which compares two of them.

A round is `--requests` prompts at once. Growing rounds begin with no memory mapped; full rounds go on with
new prompts when nothing is left and every block is an evicted one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_rig


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=gpu_rig.BACKENDS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("build/bench/llama-8b"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--generate", type=int, default=128, help="tokens")
    parser.add_argument("--growing", type=int, default=3, help="rounds")
    parser.add_argument("--full", type=int, default=4, help="rounds")
    parser.add_argument("--steady", type=int, default=2, help="rounds")
    parser.add_argument("--kv-gib", type=float, default=24.0)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of kvcached")
    return parser.parse_args()


class Run:
    """The rounds of one engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        settings = dict(pair.split("=", 1) for pair in options.option)
        started = time.monotonic()
        self.llm = gpu_rig.engine(
            options.backend,
            gpu_rig.model_folder(options.model),
            int(options.kv_gib * 2**30),
            settings,
        )
        self.seen: dict[str, Any] = {"load_seconds": time.monotonic() - started}
        self._seed = 0

    def round(self, count: int | None = None) -> float:
        """Return the tokens generated in a second by one round of new prompts."""
        from vllm import SamplingParams

        options = self.options
        self._seed += 1
        batch = gpu_rig.prompts(count or options.requests, options.prompt, self._seed)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=options.generate, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        outputs = self.llm.generate(batch, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

    def all(self) -> dict[str, Any]:
        """Run every phase."""
        options, seen = self.options, self.seen
        self.round(16)  # what is compiled late is compiled now
        seen["free_idle_bytes"] = gpu_rig.settle(self.llm)
        seen["growing"], seen["free_peak_bytes"], seen["free_after_bytes"] = [], [], []
        for _ in range(options.growing):
            seen["growing"].append(self.round())
            seen["free_peak_bytes"].append(gpu_rig.free_bytes(self.llm))
            seen["free_after_bytes"].append(gpu_rig.settle(self.llm))
        filling = [self.round() for _ in range(2)]  # 2 x 20 GiB: now it is full
        seen["filling"] = filling
        seen["full"] = [self.round() for _ in range(options.full)]
        seen["free_full_bytes"] = gpu_rig.free_bytes(self.llm)
        seen["steady"] = self.steady()
        return seen

    def steady(self) -> list[float]:
        """Return rounds with memory that is already there: it was used a moment ago, and is clean."""
        rates = []
        for _ in range(self.options.steady):
            self.llm.reset_prefix_cache()
            rates.append(self.round())
        return rates


def main() -> None:
    """Run and write."""
    options = arguments()
    run = Run(options)
    seen = run.all()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(seen))
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
