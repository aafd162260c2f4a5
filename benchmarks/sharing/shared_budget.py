"""Compare one shared budget of host memory with a static split of half and half, for two engines.

    python -m benchmarks.sharing.shared_budget [--rounds N] [--out FILE]

Two `vllm serve` processes with the tiny model run throughout. A round sends one open-loop trace: bursts on A
and on B in turn, then a burst on both at once. Half of the budget is too small for a burst, all of it is
enough. Each trace is sent twice: with limits of 50 %, and without limits. Each time the prefix caches are
empty at the start. Times to first token count from the moment a request was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from benchmarks.lib.open_loop import Arrival, Served, Shape, burst, failures, play
from benchmarks.plots import shared_budget
from devkit.client import Client
from devkit.models import tiny_model
from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY
from devkit.processes import interrupt_on_signals, no_survivors
from devkit.servers import MODEL_NAME, Server, cores
from devkit.statistics import percentile, ratio
from devkit.watch import is_at_rest
from kvcached_core.ledger import Runtime, set_limit, snapshot
from kvcached_core.units import MIB

NAMES = ("a", "b")
BUDGET_BYTES = 120 * MIB
LIMITS = {"shared": BUDGET_BYTES, "static": BUDGET_BYTES // 2}
# A request of 1200 tokens needs 10 blocks of 512 KiB. A burst needs 100 MiB.
SHAPE = Shape(requests=20, seconds=2.0, prompt_tokens=900, max_tokens=300)
BURSTS, PERIOD_SECONDS = 4, 15.0  # bursts on A and B in turn, before the burst on both at once
SAMPLE_SECONDS, REST_SECONDS = 0.2, 30.0
SEED = 7

Samples = dict[str, list[float]]


def make_trace(seed: int) -> list[Arrival]:
    """Return bursts on the engines in turn, then a burst on both at once, which exceeds the whole budget."""
    source = random.Random(seed)
    arrivals = []
    for number in range(BURSTS):
        name = NAMES[number % len(NAMES)]
        arrivals += burst(name, "alone", number * PERIOD_SECONDS, SHAPE, source)
    for name in NAMES:
        arrivals += burst(name, "together", BURSTS * PERIOD_SECONDS, SHAPE, source)
    return arrivals


class Rig:
    """Two running servers and their ledger."""

    def __init__(self, servers: Sequence[Server], folder: Path) -> None:
        self._folder = folder
        self._runtime = Runtime.open(folder)
        self.urls = {server.name: server.url for server in servers}

    def prepare(self, limit_bytes: int) -> None:
        """Set both engines' limits, drop their caches, and wait until each holds only one granule."""
        for name, url in self.urls.items():
            set_limit(self._runtime, name, limit_bytes)
            with Client(url) as client:
                until(client.reset_prefix_cache, REST_SECONDS, f"no request runs on {name}")
        for name in self.urls:
            until(partial(is_at_rest, self._folder, name), REST_SECONDS, f"{name} is at rest")

    def held(self) -> dict[str, int]:
        """Return the held and used bytes of each engine, as `NAME_held_bytes` and `NAME_used_bytes`."""
        found = {}
        for owner in (owner for device in snapshot(self._runtime) for owner in device.owners):
            found[f"{owner.name}_held_bytes"] = owner.ready_bytes
            found[f"{owner.name}_used_bytes"] = owner.used_bytes
        return found

    @contextlib.contextmanager
    def watched(self) -> Iterator[Samples]:
        """Sample held() for as long as the block runs."""
        series: Samples = defaultdict(list)
        stop, begun = threading.Event(), time.monotonic()

        def look() -> None:
            while not stop.wait(SAMPLE_SECONDS):
                series["time_seconds"].append(time.monotonic() - begun)
                for name, value in self.held().items():
                    series[name].append(value)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield series
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    """Start both servers together; end them after the block."""
    model = tiny_model()
    with no_survivors(), contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvb-", dir=SHARED_MEMORY)))
        servers = []
        for name, core in zip(NAMES, cores(len(NAMES)).split("|"), strict=True):
            settings = {"KVCACHED_NAME": name, "KVCACHED_HOST_CAPACITY": str(BUDGET_BYTES),
                        "KVCACHED_HEADROOM": "0", "KVCACHED_SPARE": "4MiB",
                        "VLLM_CPU_OMP_THREADS_BIND": core}  # fmt: skip
            flags = ["--max-model-len", "2048", "--kv-cache-backend", "kvcached"]
            servers.append(Server(name, model, folder, flags, settings))
            stack.callback(servers[-1].close)
        for server in servers:
            server.wait_ready()
        yield Rig(servers, folder)


def keep(samples: Samples, mode: str, served: Sequence[Served], series: Samples) -> None:
    """Add a round to the samples: times by mode and engine, and for a mode's first round bytes over time."""
    for each in served:
        for key in (f"{each.burst}_{mode}", f"{each.burst}_{mode}_{each.engine}"):
            samples.setdefault(f"ttft_seconds_{key}", []).append(each.ttft_seconds)
            samples.setdefault(f"end_seconds_{key}", []).append(each.end_seconds)
    samples.setdefault(f"failures_{mode}", []).append(len(failures(served)))
    for name in NAMES:
        samples.setdefault(f"{name}_peak_used_bytes_{mode}", []).append(max(series[f"{name}_used_bytes"]))
    for name, values in series.items():
        samples.setdefault(f"{name}_{mode}", values)


def run(rounds: int) -> Samples:
    """Send the trace `rounds` times in each mode, in the order static, shared, shared, static, and so on."""
    samples: Samples = {}
    begun = time.monotonic()
    with rig() as there:
        print(f"{time.monotonic() - begun:6.0f} s  both servers are ready", flush=True)
        for number in range(rounds):
            arrivals = make_trace(SEED + number)
            for mode in sorted(LIMITS, reverse=number % 2 == 0):
                there.prepare(LIMITS[mode])
                with there.watched() as series:
                    served = asyncio.run(play(there.urls, MODEL_NAME, arrivals))
                keep(samples, mode, served, series)
                for sentence in failures(served):
                    print(f"failed: {sentence}", file=sys.stderr)
                times = [each.ttft_seconds for each in served if each.burst == "alone"]
                print(f"{time.monotonic() - begun:6.0f} s  {mode}: TTFT p50 {percentile(times, 50):.2f} s, "
                      f"p99 {percentile(times, 99):.2f} s", flush=True)  # fmt: skip
    return samples


def ratios() -> dict[str, record.Ratio]:
    """Return the published ratios: shared over static."""
    wanted = {}
    for kind in ("alone", "together"):
        for statistic in ("median", "p99"):
            for suffix in ("", *(f"_{name}" for name in NAMES)):
                above, below = (f"ttft_seconds_{kind}_{mode}{suffix}" for mode in ("shared", "static"))
                wanted[f"ttft_{statistic}_{kind}{suffix}"] = record.Ratio(above, below, statistic)
    return wanted


def main() -> int:
    """Run the benchmark, write and draw the result; returns 1 if a request failed."""
    parser = options_of.parser("sharing.shared_budget", __doc__, "shared_budget.json", options_of.PICTURE_TOO)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    interrupt_on_signals()
    started = time.time()
    samples = run(options.rounds)
    notes = {"budget_bytes": BUDGET_BYTES, "shape": SHAPE._asdict(), "period_seconds": PERIOD_SECONDS}
    record.write(options.out, ["python", "-m", "benchmarks.sharing.shared_budget", *sys.argv[1:]],
                 samples, ratios(), started, notes)  # fmt: skip
    shared_budget.draw_file(options.out)
    for name, wanted in ratios().items():
        value = ratio(samples[wanted.numerator], samples[wanted.denominator], wanted.statistic)
        print(f"{name}: shared over static {value:.3f}")
    return int(any(map(sum, (samples[f"failures_{mode}"] for mode in LIMITS))))


if __name__ == "__main__":
    sys.exit(main())
