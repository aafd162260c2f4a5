"""Compare stock and elastic engines that are both resident on one GPU and run alternately.

    python -m benchmarks.engine.alternating --engine vllm --out benchmarks/results/vllm_alternating.json

Both engines have the shape of Llama-8B. They run alternately in one session, so differences between starts
and slow drift of the machine cancel out. On a GPU the running engine has half of the CPUs and the idle
engine the other half, because an idle SGLang spins. A round sends `--requests` new prompts at once. The
phases:

    growing   begins with no memory mapped, after a pause; the stock engine pauses too
    full      every new block evicts an old one
    steady    the memory is mapped already, and nothing is cached
    prefill   like steady, with one generated token for each prompt
    decode    like steady, with short prompts and many generated tokens

On a GPU the driver's free memory is recorded before and after each round; it reflects the memory of both
engines. With `--profile`, kernels of one growing and one steady round of each engine are recorded at the end.
Without a GPU (or with `--host --model FOLDER`) the benchmark runs on the CPU with small sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from benchmarks.lib import cpus, engines
from benchmarks.lib import options as options_of
from benchmarks.lib.engines import Engine, EngineDiedError, Scale, owner_of
from benchmarks.lib.record import Ratio, write
from benchmarks.lib.runtime import own_runtime
from benchmarks.lib.sglang_engine import BYTES_PER_TOKEN
from devkit.polling import until
from devkit.statistics import pairwise
from kvcached_core.ledger import OwnerSnapshot, Runtime

START_SECONDS, ROUND_SECONDS, REST_SECONDS = 300.0, 240.0, 30.0
# Pause before a growing round, after which idle memory is unmapped. The stock engine pauses equally long,
# because after a pause the device is slow at first for either engine.
PAUSE_SECONDS = 6.0
PHASES = ("growing", "full", "steady", "prefill", "decode")
FILLS = 2  # rounds after which the cache is full
DECODE_PROMPT = 16  # tokens
HOST_BUDGET = 48  # units of Scale.gib bytes
HOST_TOKEN_BYTES = 4096  # KV cache of one token of the tiny model


class Shape(NamedTuple):
    """A round: the number of prompts, the tokens of each, and the tokens generated for each."""

    requests: int
    prompt: int
    generate: int


@dataclass
class Found:
    """Raw samples by measurement and engine, and profiles."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    profiles: dict[str, Any] = field(default_factory=dict)

    def note(self, backend: str, **values: float) -> None:
        for name, value in values.items():
            self.samples.setdefault(f"{name}_{backend}", []).append(value)


class Contender:
    """One of the two compared engines."""

    def __init__(
        self, engine: Engine, seeds: Iterable[int], owner: Callable[[], OwnerSnapshot] | None,
        halves: Sequence[frozenset[int]] | None = None,
    ) -> None:  # fmt: skip
        """`owner` returns an elastic engine's ledger entry; `halves` are the CPUs to run and to idle on."""
        self.name = engine.name
        self._engine = engine
        self._seeds = iter(seeds)
        self._halves = halves
        self.owner = owner

    def place(self, works: bool) -> None:
        """Move the engine to the CPUs of the running engine, or to those of the idle one."""
        if self._halves:
            cpus.place(self._engine.group, self._halves[0 if works else 1])

    def round(self, shape: Shape) -> float:
        """Return the generated tokens per second of a round. Raises RuntimeError if a request failed."""
        asked = self._engine.burst(shape.requests, shape.prompt, shape.generate, next(self._seeds))
        answer = self._engine.result(asked, ROUND_SECONDS)
        if answer["failed"]:
            raise RuntimeError(f"{answer['failed']} requests of {self.name} failed: see {self._engine.log}")
        return float(answer["tokens"] / (answer["ended"] - answer["started"]))

    def flush(self) -> None:
        """Drop the prefix cache. Raises TimeoutError."""
        self._until(lambda: bool(self._engine.result(self._engine.ask("flush"), REST_SECONDS)["done"]))

    def rest(self, seconds: float) -> float:
        """Drop the prefix cache; wait at least `seconds`, and until an elastic engine holds one granule.

        Returns the seconds of the wait.
        """
        began = time.monotonic()
        self.flush()
        if owner := self.owner:
            self._until(lambda: owner().ready_bytes == owner().granule_bytes)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        return time.monotonic() - began

    def profiled(self, shape: Shape) -> dict[str, Any]:
        """Return a summary of the kernels of a round; see benchmarks.lib.profiles."""
        self._engine.result(self._engine.ask("profile"), REST_SECONDS)
        self.round(shape)
        profile: dict[str, Any] = self._engine.result(self._engine.ask("profiled"), ROUND_SECONDS)["profile"]
        return profile

    def _until(self, done: Callable[[], bool]) -> None:
        until(done, REST_SECONDS, f"{self.name} is at rest; see {self._engine.log}", poll_seconds=0.05)


class Play:
    """Runs the phases. In each phase the engines run alternately."""

    def __init__(
        self, contenders: list[Contender], shape: Shape, rounds: int, found: Found,
        phases: Sequence[str] = PHASES, save: Callable[[], None] = lambda: None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        """`save` is called after each round of all engines, so a later failure loses no measurement.

        `free_bytes` returns the free memory of the device (None: not recorded).
        """
        self._contenders, self._shape, self._rounds, self._found = contenders, shape, rounds, found
        self._phases, self._save, self._free_bytes = phases, save, free_bytes

    def run(self, profiles: bool) -> None:
        """Run all phases."""
        shape = self._shape
        for contender in self._in_turn(self._contenders):
            contender.round(shape)  # warm up
            self._rest(contender)
        self._phase("growing", shape, self._rest, Contender.flush)
        if "full" in self._phases:
            for contender in self._in_turn(self._contenders * FILLS):
                contender.round(shape)
        self._phase("full", shape)
        self._phase("steady", shape, Contender.flush)
        self._phase("prefill", shape._replace(generate=1), Contender.flush)
        decode = shape._replace(prompt=min(DECODE_PROMPT, shape.prompt), generate=2 * shape.generate)
        self._phase("decode", decode, Contender.flush)
        if profiles:
            self._profiles()

    def _phase(self, name: str, shape: Shape, before: Callable[[Contender], None] | None = None,
               after: Callable[[Contender], None] | None = None) -> None:  # fmt: skip
        if name not in self._phases:
            return
        for turn in range(self._rounds):
            order = self._contenders[:: -1 if turn % 2 else 1]  # neither engine always runs second
            for contender in self._in_turn(order):
                if before:
                    before(contender)
                self._bytes(contender, f"{name}_before")
                rate = contender.round(shape)
                self._found.note(contender.name, **{f"{name}_tokens_per_second": rate})
                self._bytes(contender, f"{name}_after")
                if after:
                    after(contender)
            self._save()
        print(f"{name}: {self._shown(name)}", flush=True)

    def _in_turn(self, order: Iterable[Contender]) -> Iterator[Contender]:
        """Yield each engine in turn, after moving it to the CPUs of the running engine."""
        for contender in order:
            for one in self._contenders:
                one.place(one is contender)
            yield contender

    def _rest(self, contender: Contender) -> None:
        self._found.note(contender.name, rest_seconds=contender.rest(PAUSE_SECONDS))

    def _bytes(self, contender: Contender, when: str) -> None:
        if owner := contender.owner:
            self._found.note(contender.name, **{f"{when}_ready_bytes": owner().ready_bytes})
        if self._free_bytes:
            self._found.note(contender.name, **{f"{when}_free_bytes": self._free_bytes()})

    def _profiles(self) -> None:
        for name, before in (("growing", self._rest), ("steady", Contender.flush)):
            for contender in self._in_turn(self._contenders):
                before(contender)
                try:
                    profile = contender.profiled(self._shape)
                except (TimeoutError, EngineDiedError) as error:  # keep the measurements so far
                    profile = {"error": str(error)}
                self._found.profiles[f"{name}_{contender.name}"] = profile
                self._save()

    def _shown(self, phase: str) -> str:
        rates = {
            one.name: self._found.samples[f"{phase}_tokens_per_second_{one.name}"] for one in self._contenders
        }
        return ", ".join(compared(name, values, rates["stock"]) for name, values in rates.items())


def compared(name: str, rates: list[float], stock: list[float]) -> str:
    """Return as text the median rate, and the mean of the rounds' ratios to stock with its standard error."""
    rounds = pairwise(rates, stock)
    return f"{name} {statistics.median(rates):.0f} ({rounds.mean:.4f} +- {rounds.error:.4f})"


def contestants(options: argparse.Namespace, scale: Scale) -> list[Engine]:
    """Start a stock and an elastic engine with the same bound on their KV caches."""
    size_bytes = HOST_BUDGET * scale.gib if scale.on_host else int(options.kv_gib * scale.gib)
    settings = {"headroom": "16MiB", "host_capacity": str(2 * size_bytes)} if scale.on_host else {}
    settings |= options_of.settings(options)
    arguments: dict[str, Any]
    if options.engine == "sglang":
        settings |= {"limit": str(size_bytes)}
        arguments = {"load_format": "dummy", "max_running_requests": options.requests, "page_size": 1}
        tokens = size_bytes // (HOST_TOKEN_BYTES if scale.on_host else BYTES_PER_TOKEN)
        stock: dict[str, Any] = {"max_total_tokens": tokens}
    else:
        arguments = {"kv_cache_memory_bytes": size_bytes}
        stock = (
            {} if scale.on_host else {"gpu_memory_utilization": 0.4}
        )  # vLLM checks it at start; kv_cache_memory_bytes sets the size
    started = []
    for core, (backend, more) in enumerate((("stock", stock), ("kvcached", {}))):
        own = replace(scale, arguments={**scale.arguments, **arguments, **more})
        started.append(
            Engine(backend, own, options.logs, settings, core, backend=backend, engine=options.engine)
        )
    return started


def run(options: argparse.Namespace, scale: Scale, runtime: Runtime, found: Found,
        save: Callable[[], None]) -> None:  # fmt: skip
    """Start both engines, run the phases, and end both engines."""
    parties = contestants(options, scale)
    try:
        for engine in parties:
            found.note(engine.name, start_seconds=engine.wait_ready(START_SECONDS))
        seeds, halves = itertools.count(1), None if scale.on_host else cpus.halves()
        contenders = [
            Contender(
                engine, seeds, None if engine.name == "stock" else partial(owner_of, engine.name, runtime),
                halves,
            )
            for engine in parties
        ]  # fmt: skip
        shape = Shape(options.requests, options.prompt, options.generate)
        free_bytes = None if scale.on_host else engines.free_of(runtime, on_host=False)
        Play(contenders, shape, options.rounds, found, options.phases, save, free_bytes).run(options.profile)
    finally:
        for engine in parties:
            engine.kill()


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = options_of.parser("engine.alternating", __doc__)
    options_of.add_engine(parser)
    options_of.add_engines(parser, "alternating")
    options_of.add_requests(parser, 224, 20.0)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each phase and engine")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--profile", action="store_true", help="record kernels in two rounds of each engine")
    options_of.add_settings(parser)
    return parser.parse_args()


def main() -> None:
    """Run the phases, write the JSON and print the ratios."""
    options, started, found = arguments(), time.time(), Found()

    def save() -> None:
        rate = "tokens_per_second"
        rates = {
            phase: [f"{phase}_{rate}_{backend}" for backend in ("kvcached", "stock")] for phase in PHASES
        }
        ratios = {phase: Ratio(*names) for phase, names in rates.items() if names[0] in found.samples}
        write(options.out, sys.argv, found.samples, ratios, started, {"profiles": found.profiles})

    with own_runtime() as runtime:
        run(options, engines.scale(options.host, options.model, options.engine), runtime, found, save)
    print(json.dumps(json.loads(options.out.read_text())["ratios"], indent=1))


if __name__ == "__main__":
    main()
