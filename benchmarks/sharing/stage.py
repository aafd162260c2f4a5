"""The common part of the scenes of one_gpu and two_gpus: engines, a watch on the ledger, and findings."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.lib import engines
from benchmarks.lib.engines import Engine, Scale
from benchmarks.lib.ledger_watch import Watch
from devkit.polling import until
from kvcached_core.ledger import Runtime

START_SECONDS, BURST_SECONDS, PROBE_SECONDS = 240.0, 120.0, 30.0
POLL_SECONDS = 0.002
PROBES, PROBE_TOKENS = 6, 48
NAMES = "abcd"
CAPACITY_UNITS = 27  # capacity on the host: as much as an H100 has besides the weights of three engines


class Stage:
    """The engines, the watch, samples and checks. Sizes are in units of `scale.gib` bytes."""

    def __init__(self, scale: Scale, logs: Path, runtime: Runtime, most_seconds: float) -> None:
        self.scale = scale
        self.runtime = runtime
        self.watch = Watch(runtime)
        self.engines: dict[str, Engine] = {}
        self.samples: dict[str, list[float]] = {}
        self.checks: dict[str, bool] = {}
        self.failures: dict[str, str] = {}
        self.probes: list[list[list[int]]] = []
        self._logs = logs
        self._give_up_at = time.monotonic() + most_seconds
        self._seeds = itertools.count(1)

    def start(self, name: str) -> Engine:
        """Start an engine without waiting until it serves."""
        options = {"headroom": "16MiB", "host_capacity": str(CAPACITY_UNITS * self.scale.gib)}
        core = NAMES.index(name)
        self.engines[name] = Engine(name, self.scale, self._logs, options if self.scale.on_host else {}, core)
        return self.engines[name]

    def seconds(self, most: float) -> float:
        """Return `most`, or the run's remaining time if that is less. Raises TimeoutError if none is left."""
        left = self._give_up_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left for this")
        return min(most, left)

    def ready(self, name: str) -> None:
        """Wait until an engine serves, and record how long the start took."""
        seconds = self.engines[name].wait_ready(self.seconds(START_SECONDS))
        self.samples[f"{name}_start_seconds"] = [seconds]
        self.samples[f"{name}_waited_for_room_seconds"] = [self.watch.starting_seconds(name)]
        self.samples[f"{name}_blocks"] = [self.watch.owner(name).block_count]
        self.watch.note(f"{name.upper()} serves after {seconds:.1f} s")

    def burst(self, name: str, units: float, prompt: int = 0, generate: int = 0) -> Future[dict[str, Any]]:
        """Send an engine new requests that need `units` units of KV cache."""
        engine = self.engines[name]
        prompt, generate = prompt or self.scale.prompt, generate or self.scale.generate
        size_bytes = round(units * self.scale.gib)
        count = engine.requests_in(size_bytes, prompt + generate, self.watch.owner(name))
        return engine.burst(count, prompt, generate, next(self._seeds))

    def end(self, name: str, asked: Future[dict[str, Any]], what: str) -> dict[str, Any]:
        """Wait for the end of a burst, and record its rate; `failed` counts requests that lack tokens."""
        answer = self.engines[name].result(asked, self.seconds(BURST_SECONDS))
        rate = answer["tokens"] / (answer["ended"] - answer["started"])
        self.samples[f"{what}_tokens_per_second"] = [rate]
        self.samples[f"{what}_failed_requests"] = [answer["failed"]]
        return answer

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Poll until the condition holds, and return the elapsed seconds. Raises TimeoutError."""
        return until(condition, self.seconds(seconds), what, POLL_SECONDS)

    def fill(self, name: str) -> None:
        """Fill the device with an engine's prefix cache, until the cache can grow no more."""
        engine = self.engines[name]
        held = engines.fill(
            engine, lambda: self.watch.owner(name), self.scale, self._seeds, self.seconds(BURST_SECONDS)
        )
        self.watch.note(f"{name.upper()} has filled the device with its cache: {held / self.scale.gib:.1f}")

    def probe(self) -> None:
        """Record A's answers to always the same prompts, sent one by one, without prefix cache hits."""
        answers = []
        for seed in range(PROBES):
            asked = self.engines["a"].burst(
                1, 200, PROBE_TOKENS, 10_000 + seed, salt=f"probe-{len(self.probes)}", keeps=True
            )
            answers += self.engines["a"].result(asked, self.seconds(PROBE_SECONDS))["outputs"]
        self.probes.append(answers)
        differ = sum(first != now for first, now in zip(self.probes[0], answers, strict=True))
        self.samples.setdefault("probes_different", []).append(differ)
        self.samples["probe_distinct_tokens"] = [
            len({token for answer in self.probes[0] for token in answer})
        ]
        self.watch.note(f"A answers {PROBES} prompts, {differ} otherwise than at first")

    def peak(self, name: str, since: float, word: str = "held") -> float:
        """Return the most that an engine held, or used, since the time `since`."""
        values = [getattr(moment.of(name), word) for moment in self.watch.between(since)]
        return float(max(values, default=0))
