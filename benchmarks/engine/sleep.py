"""Measure sleep mode: one engine sleeps, another grows into its memory, and the first one wakes.

    python -m benchmarks.engine.sleep --out benchmarks/results/sleep.json

Two vLLM engines of the shape of Llama-8B run on one GPU. In every round engine A answers, fills the device
with its cache and sleeps (level 1: its weights go to host memory). Engine B fills the device with its own
cache. Then B has to make room, A wakes, and A must answer as before. Free memory is the driver's figure. The
exit status is 1 if a check failed. Without a GPU (or with `--host --model FOLDER`) sizes are small, only the
KV cache is freed, and free memory is the ledger's figure.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.lib import engines
from benchmarks.lib import options as options_of
from benchmarks.lib.engines import Engine, Scale
from benchmarks.lib.record import print_checks, write
from benchmarks.lib.runtime import own_runtime
from kvcached_core.ledger import OwnerSnapshot, Runtime

START_SECONDS, ANSWER_SECONDS = 300.0, 240.0
PROBES, PROBE_TOKENS = 6, 48


class Party(Protocol):
    """The operations of an engine that a round uses."""

    def answers(self, salt: str) -> list[list[int]]:
        """Return the answers to always the same prompts, computed without the prefix cache."""

    def fill(self) -> None:
        """Fill the device with its cache."""

    def sleep(self) -> float:
        """Put the engine to sleep; return the seconds that it took."""

    def wake(self) -> float:
        """Wake the engine; return the seconds that it took."""

    def owner(self) -> OwnerSnapshot:
        """Return the engine's entry in the ledger."""


@dataclass
class Found:
    """Raw samples of all rounds, and the number of rounds in which each check failed."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)

    def note(self, **values: float) -> None:
        for name, value in values.items():
            self.samples.setdefault(name, []).append(value)

    def check(self, what: str, holds: bool) -> None:
        self.broken[what] = self.broken.get(what, 0) + (not holds)


def play(a: Party, b: Party, free_bytes: Callable[[], int], rounds: int, found: Found) -> None:
    """Run `rounds` rounds with the engines `a` and `b`."""
    first = a.answers("first")
    for number in range(rounds):
        a.fill()
        full, held = free_bytes(), a.owner()
        found.note(a_sleep_seconds=a.sleep())
        asleep, sleeping = free_bytes(), a.owner()
        private = held.private_now_bytes - sleeping.private_now_bytes
        found.note(
            free_before_sleep_bytes=full, free_asleep_bytes=asleep, a_cache_freed_bytes=held.ready_bytes
            - sleeping.ready_bytes, a_private_freed_bytes=private,
        )  # fmt: skip
        found.check("A sleeps with its null granule alone", sleeping.leased_bytes == sleeping.granule_bytes)
        found.check(
            "the driver has what A says it freed",
            asleep - full >= 0.95 * (held.ready_bytes - sleeping.ready_bytes + private),
        )
        b.fill()
        grown = b.owner().ready_bytes
        found.note(b_grown_bytes=grown, free_grown_bytes=free_bytes(), a_wake_seconds=a.wake())
        found.note(free_awake_bytes=free_bytes(), b_left_bytes=b.owner().ready_bytes)
        found.check("B grew into what A had", grown > held.ready_bytes / 2 + private / 2)
        found.check("A answers as before it slept", a.answers(f"round-{number}") == first)


class Played:
    """A real engine in its own process."""

    def __init__(self, engine: Engine, scale: Scale, runtime: Runtime, seeds: itertools.count[int]) -> None:
        self._engine, self._scale, self._runtime, self._seeds = engine, scale, runtime, seeds

    def answers(self, salt: str) -> list[list[int]]:
        """See Party."""
        answers = []
        for seed in range(PROBES):  # one by one: bf16 results depend on the other requests of a batch
            asked = self._engine.burst(1, 200, PROBE_TOKENS, 10_000 + seed, salt=salt, keeps=True)
            answers += self._end(asked)["outputs"]
        return answers

    def fill(self) -> None:
        """See Party."""
        engines.fill(self._engine, self.owner, self._scale, self._seeds, ANSWER_SECONDS)

    def sleep(self) -> float:
        """See Party."""
        return float(self._end(self._engine.ask("sleep", level=1))["seconds"])

    def wake(self) -> float:
        """See Party."""
        return float(self._end(self._engine.ask("wake"))["seconds"])

    def owner(self) -> OwnerSnapshot:
        """See Party."""
        return engines.owner_of(self._engine.name, self._runtime)

    def randomize(self) -> None:
        """Draw random weights, with which answers depend on the content of the KV cache."""
        self._end(self._engine.ask("randomize", seed=7, deviation=0.05))

    def _end(self, asked: Any) -> dict[str, Any]:
        return self._engine.result(asked, ANSWER_SECONDS)


def run(
    scale: Scale, logs: Path, runtime: Runtime, rounds: int, found: Found, headroom: str | None = None
) -> None:
    """Start both engines, run all rounds, and end both; `headroom` is GPU memory that they leave unused."""
    if scale.on_host:
        settings = {"headroom": "16MiB", "host_capacity": str(27 * scale.gib)}
    else:
        settings = {"headroom": headroom} if headroom else {}
        scale = replace(scale, arguments={**scale.arguments, "enable_sleep_mode": True})
    parties = [Engine(name, scale, logs, settings, core) for core, name in enumerate("ab")]
    try:
        seeds = itertools.count(1)
        a, b = (Played(engine, scale, runtime, seeds) for engine in parties)
        for engine in parties:
            engine.wait_ready(START_SECONDS)
        a.randomize()
        play(a, b, engines.free_of(runtime, scale.on_host), rounds, found)
    finally:
        for engine in parties:
            engine.kill()


def main() -> int:
    """Run all rounds and write the result."""
    parser = options_of.parser("engine.sleep", __doc__)
    options_of.add_engines(parser, "sleep")
    options_of.add_headroom(parser)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    started, found = time.time(), Found()
    with own_runtime() as runtime:
        scale = engines.scale(options.host, options.model)
        run(scale, options.logs, runtime, options.rounds, found, options.headroom)
    notes = {"rounds": options.rounds, "rounds_in_which_a_check_failed": found.broken}
    write(options.out, sys.argv, found.samples, {}, started, notes)
    return print_checks({what: not count for what, count in found.broken.items()})


if __name__ == "__main__":
    sys.exit(main())
