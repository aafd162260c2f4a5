"""Run a vLLM and an SGLang server with staggered peaks on one device, and check that memory moves.

    python -m benchmarks.sharing.beside --vllm-python PYTHON --sglang-python PYTHON --out FILE

The SGLang server answers alone, then the vLLM server starts beside it. vLLM gets a burst of requests, then
SGLang, then vLLM again, then both at once. Each server answers test prompts while the other has a burst. Both
rest. SGLang is killed in its peak, and vLLM answers alone. Each server's memory in the ledger, and the
driver's free memory (on the host the ledger's), are sampled throughout. Run it with a Python that has httpx
and, for the picture, matplotlib; on a GPU also NVML. The model has the shape of Llama-8B on a GPU and is tiny
on the CPU. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.lib import engines
from benchmarks.lib import options as options_of
from benchmarks.lib.ledger_watch import Moment
from benchmarks.lib.record import print_checks, write
from benchmarks.lib.runtime import own_runtime
from benchmarks.plots import engines as plots
from benchmarks.sharing import beside_servers
from benchmarks.sharing.beside_observer import Observer
from benchmarks.sharing.beside_servers import Served, Where
from devkit.processes import interrupt_on_signals, no_survivors
from kvcached_core.ledger import Runtime

A, B = "vllm", "sglang"
PEAK = 0.75  # a burst needs this share of the memory of both servers
WAIT_SECONDS, REST_SECONDS, GROW_SECONDS, SERIES_SECONDS = 180.0, 30.0, 1.0, 0.1
ROUNDING = 0.9  # tolerance: the ledger and the driver are read at different moments
FULL = 0.95  # share of the most that both held; below it a server grows without taking from the other


class Party(Protocol):
    """The operations of a server that the scenes use."""

    name: str

    def burst(self, size_bytes: int) -> Future[int]:
        """Send requests that need `size_bytes` of KV memory; the result is the number that failed."""

    def answers(self) -> list[tuple[int, ...]]:
        """Return the answers to always the same prompts, sent one by one, with an empty prefix cache."""

    def flush(self) -> None:
        """Drop the prefix cache."""

    def kill(self) -> None:
        """Send SIGKILL to all processes of the server."""


class Observing(Protocol):
    """The observer of both servers, as the scenes use it."""

    def now(self) -> Moment:
        """Return the latest moment."""

    def between(self, begin: float) -> list[Moment]:
        """Return the moments since `begin`."""

    def at_rest(self) -> bool:
        """Return whether each server holds only one granule."""

    def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds; return whether it held in time."""

    def note(self, text: str) -> None:
        """Record an event."""


@dataclass
class Found:
    """Raw samples and checks."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    failed: int = 0  # failed requests

    def note(self, **values: float) -> None:
        """Add to the samples."""
        for name, value in values.items():
            self.samples.setdefault(name, []).append(value)


class Play:
    """Runs the scenes. `budget` is the memory that both servers may hold together, in bytes."""

    def __init__(self, a: Party, b: Party, observer: Observing, budget: int, found: Found) -> None:
        self.a, self.b, self.observer, self.budget, self.found = a, b, observer, budget, found
        found.note(budget_bytes=budget)

    def run(self, b_alone: list[tuple[int, ...]]) -> None:
        """Run all scenes; `b_alone` are B's answers from before A started."""
        self.peak(self.a, self.b)
        self.found.checks["memory moved from vLLM to SGLang"] = self.peak(self.b, self.a) > self.budget / 4
        self.found.checks["memory moved from SGLang to vLLM"] = self.peak(self.a, self.b) > self.budget / 4
        self.both()
        a_beside, b_beside = (self.beside(*pair) for pair in ((self.a, self.b), (self.b, self.a)))
        self.found.checks["SGLang answers beside vLLM as alone"] = b_beside == b_alone
        self.idle()
        self.killed()
        self.found.checks["vLLM answers beside SGLang as alone"] = self.a.answers() == a_beside
        distinct = len({token for answer in b_alone for token in answer})
        self.found.note(distinct_tokens_in_answers=distinct)
        self.found.checks["the answers say something"] = distinct > 1
        self.found.note(failed_requests=self.found.failed)
        self.found.checks["all requests succeeded but those of the killed server"] = not self.found.failed

    def peak(self, who: Party, other: Party) -> int:
        """Run a burst on the server `who`; return the bytes that the other server gave up meanwhile."""
        before = self.observer.now()
        self.end(who.burst(int(PEAK * self.budget)))
        seen = self.observer.between(before.at)
        used = max((moment.of(who.name).used for moment in seen), default=0)
        given = before.of(other.name).held - min(moment.of(other.name).held for moment in [before, *seen])
        self.found.note(**{f"{who.name}_peak_used_bytes": used, f"{other.name}_given_bytes": given,
                           "free_least_bytes": min(moment.free for moment in [before, *seen])})  # fmt: skip
        above = f"each peak of {who.name} was above half of what both may hold"
        self.found.checks[above] = self.found.checks.get(above, True) and used > self.budget / 2
        self.observer.note(f"{who.name} had a peak of {used / self.budget:.0%}")
        return given

    def both(self) -> None:
        """Run a burst on both servers at once."""
        for asked in [party.burst(int(PEAK * self.budget)) for party in (self.a, self.b)]:
            self.end(asked)
        self.observer.note("both had a burst at once")

    def beside(self, who: Party, other: Party) -> list[tuple[int, ...]]:
        """Return the answers of the server `who` during a burst on the other server."""
        asked = other.burst(int(PEAK * self.budget))
        answers = who.answers()
        self.end(asked)
        self.observer.note(f"{who.name} answered beside a burst")
        return answers

    def idle(self) -> None:
        """Drop both caches and wait: the driver must get the memory back."""
        before = self.observer.now()
        self.a.flush()
        self.b.flush()
        rest = self.observer.wait(self.observer.at_rest, REST_SECONDS)
        self.found.checks["idle servers keep their first granule"] = rest
        rested = self.observer.now().at  # this sample and the next may predate the rest; later ones do not
        self.observer.wait(lambda: len(self.observer.between(rested)) > 2, REST_SECONDS)

        def freed() -> bool:
            after = self.observer.now()
            return after.free - before.free >= ROUNDING * (held(before) - held(after)) > 0

        self.found.checks["the driver has what they gave"] = self.observer.wait(freed, REST_SECONDS)
        after = self.observer.now()
        self.found.note(held_before_idle_bytes=held(before), held_idle_bytes=held(after),
                        free_before_idle_bytes=before.free, free_idle_bytes=after.free)  # fmt: skip
        self.observer.note("both are idle and forgot their caches")

    def killed(self) -> None:
        """Kill B in its peak while A wants more memory: A must get the memory of B."""
        size = int(PEAK * self.budget)
        b = self.b.burst(size)
        self.observer.wait(lambda: self.observer.now().of(B).used > self.budget / 2 or b.done(), WAIT_SECONDS)
        a = self.a.burst(size)
        # less than the budget, because each server leaves room for its memory outside the KV cache
        most = max(map(held, self.observer.between(0.0)))
        self.observer.wait(
            lambda: held(self.observer.now()) > FULL * most or a.done() or b.done(), WAIT_SECONDS
        )
        last = self.observer.now()
        in_peak = last.of(B).used > self.budget / 2 and not (a.done() or b.done())
        self.b.kill()
        what = "SGLang was killed in its peak, the device full and vLLM in a burst"
        self.found.checks[what] = in_peak and held(last) > FULL * most
        self.observer.note("sglang is killed in its peak")
        self.grown(last, a, max(most, held(last)) - last.of(B).held)

    def grown(self, last: Moment, a: Future[int], room: int) -> None:
        """Wait for the end of A's burst, and check A's growth since `last`, the last sample before B's death.

        While B lived, A could not hold more than `room` bytes.
        """
        self.end(a)
        seen = self.observer.between(last.at)
        grows = seconds_until(lambda moment: moment.of(A).held > room, seen, last.at)
        dead = seconds_until(lambda moment: B not in moment.seen, seen, last.at)
        most = max(moment.of(A).held for moment in seen)
        self.found.note(a_grows_after_kill_seconds=grows, b_dead_after_kill_seconds=dead,
                        a_held_at_kill_bytes=last.of(A).held, b_held_at_kill_bytes=last.of(B).held,
                        a_held_after_kill_bytes=most)  # fmt: skip
        in_time = 0 <= grows <= GROW_SECONDS
        self.found.checks["vLLM grew into the killed server's memory within a second"] = in_time
        self.observer.note(f"sglang was dead after {dead:.2f} s, vllm grew into it after {grows:.2f} s")

    def end(self, asked: Future[int]) -> None:
        """Wait for a burst. Raises TimeoutError."""
        if not self.observer.wait(asked.done, WAIT_SECONDS):
            raise TimeoutError(f"a burst has not ended within {WAIT_SECONDS:.0f} s: see the servers' logs")
        self.found.failed += asked.result()


def held(moment: Moment) -> int:
    """Return the bytes that both servers hold together."""
    return moment.of(A).held + moment.of(B).held


def seconds_until(holds: Callable[[Moment], bool], seen: list[Moment], since: float) -> float:
    """Return the seconds from `since` to the first sample for which `holds` is true, or -1."""
    return next((moment.at - since for moment in seen if holds(moment)), -1.0)


def run(options: argparse.Namespace, where: dict[str, Where], folder: Path, found: Found) -> Observer:
    """Start both servers, run the scenes, and end both servers."""
    on_host = options.device == "cpu"
    scale = beside_servers.scale(on_host, options.model, where[A], options.headroom)
    observer, seeds = Observer(Runtime.open(folder), on_host), itertools.count(1)
    with no_survivors(), ExitStack() as stack:
        stack.callback(observer.watch.stop)
        theirs = beside_servers.start_sglang(scale, where[B], folder)
        stack.callback(theirs.close)
        theirs.wait_ready()
        b = Served(B, theirs, scale, seeds)
        b_alone = b.answers()
        ours = beside_servers.start_vllm(scale, where[A], folder)
        stack.callback(ours.close)
        ours.wait_ready()
        observer.note("vllm serves beside it")
        b.flush()
        observer.wait(observer.at_rest, REST_SECONDS)
        Play(Served(A, ours, scale, seeds), b, observer, observer.budget({A, B}), found).run(b_alone)
    found.checks["the sum was never above the device"] = not observer.violations
    return observer


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = options_of.parser("sharing.beside", __doc__, out_help=options_of.PICTURE_TOO)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if engines.has_gpu() else "cpu")
    for name in engines.CHILDREN:
        parser.add_argument(f"--{name}-python", default=sys.executable)
        parser.add_argument(f"--{name}-site", type=Path, help="folder of packages for this engine alone")
    parser.add_argument("--model", type=Path, default=Path("build/bench/llama-8b-weights"), help="on a GPU")
    options_of.add_headroom(parser)
    return parser.parse_args()


def main() -> int:
    """Run the scenes, write the result and draw it."""
    options, started, found = arguments(), time.time(), Found()
    where = {A: Where(options.vllm_python, options.vllm_site),
             B: Where(options.sglang_python, options.sglang_site)}  # fmt: skip
    interrupt_on_signals()
    with own_runtime() as runtime:
        observer = run(options, where, runtime.path, found)
    series = observer.watch.series((A, B), SERIES_SECONDS)
    notes = {"events": observer.watch.events, "checks": found.checks, "violations": observer.violations[:20],
             "engines": {A: "vLLM", B: "SGLang"}, "title": "A vLLM and an SGLang server",
             "versions": {name: one.versions() for name, one in where.items()}}  # fmt: skip
    write(options.out, sys.argv, series | found.samples, {}, started, notes)
    plots.held_over_time(json.loads(options.out.read_text()), options.out.with_suffix(".png"))
    return print_checks(found.checks)


if __name__ == "__main__":
    sys.exit(main())
