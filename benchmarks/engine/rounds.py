"""The rounds of benchmarks.engine.throughput for either engine: growing, full and steady.

A round sends `--requests` prompts at once. Growing rounds begin with no memory mapped. Full rounds send new
prompts when no memory is left, so cached blocks are evicted. Steady rounds run on memory that is mapped
already.
"""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks.lib import options as options_of
from benchmarks.lib import vllm_engine

SETTLE_SECONDS = 5.0  # a little more than two idle periods of kvcached


def arguments(module: str, description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = options_of.parser(module, description)
    parser.add_argument("--backend", choices=vllm_engine.BACKENDS, required=True)
    parser.add_argument("--model", type=Path, default=Path("build/bench/llama-8b"))
    options_of.add_requests(parser, 256, 24.0)
    parser.add_argument("--growing", type=int, default=3, help="number of growing rounds")
    parser.add_argument("--full", type=int, default=4, help="number of full rounds")
    parser.add_argument("--steady", type=int, default=2, help="number of steady rounds")
    options_of.add_ranks(parser)
    options_of.add_settings(parser)
    return parser.parse_args()


class Rounds(ABC):
    """The rounds of one engine. A subclass starts the engine and sends it the prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._seed = 0
        settings: dict[str, Any] = {**options_of.settings(options)}
        started = time.monotonic()
        self.start(int(options.kv_gib * 2**30), settings)
        self.seen: dict[str, Any] = {"load_seconds": time.monotonic() - started}

    @abstractmethod
    def start(self, kv_bytes: int, settings: dict[str, Any]) -> None:
        """Start the engine with a KV cache of `kv_bytes`."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        """Generate `tokens` tokens for each prompt; return how many tokens were generated."""

    @abstractmethod
    def flush(self) -> None:
        """Drop the prefix cache."""

    @abstractmethod
    def free_bytes(self) -> list[int]:
        """Return the free memory of each rank's device."""

    def round(self, count: int | None = None) -> float:
        """Return the generated tokens per second of one round of new prompts."""
        options = self.options
        self._seed += 1
        drawn = vllm_engine.prompts(count or options.requests, options.prompt, self._seed)
        prompts = [prompt["prompt_token_ids"] for prompt in drawn]
        started = time.perf_counter()
        tokens = self.generate(prompts, options.generate)
        return tokens / (time.perf_counter() - started)

    def look(self, name: str) -> None:
        """Record the free memory of each device: the first as `name`, the others as `name_rankN`."""
        for rank, size_bytes in enumerate(self.free_bytes()):
            self.seen.setdefault(f"{name}_rank{rank}" if rank else name, []).append(size_bytes)

    def settle(self, name: str) -> None:
        """Drop the prefix cache, leave the engine idle for a while, and record the free memory."""
        self.flush()
        time.sleep(SETTLE_SECONDS)
        self.look(name)

    def steady(self) -> list[float]:
        """Return the rates of rounds on memory that is mapped already, with an empty prefix cache."""
        rates = []
        for _ in range(self.options.steady):
            self.flush()
            rates.append(self.round())
        return rates

    def run(self) -> None:
        """Run all rounds, and write the measurements as JSON."""
        options, seen = self.options, self.seen
        self.round(16)  # warm up
        self.settle("free_idle_bytes")
        seen["growing"] = []
        for _ in range(options.growing):
            seen["growing"].append(self.round())
            self.look("free_peak_bytes")
            self.settle("free_after_bytes")
        seen["filling"] = [self.round() for _ in range(2)]  # 20 GiB each: afterwards the cache is full
        seen["full"] = [self.round() for _ in range(options.full)]
        self.look("free_full_bytes")
        seen["steady"] = self.steady()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(seen))
        print(json.dumps(seen), flush=True)
