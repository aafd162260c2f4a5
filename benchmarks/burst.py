"""What a burst waits for before its first step: one rank's memory, from nothing and back, without an engine.

    python -m benchmarks.burst --out benchmarks/results/burst.json

Granules for two steps are asked for at once, as a scheduler does; the first step's are waited for and taken
by a plan; then all goes back. All this alone, and beside a thread that computes in Python as one does that
unpacks a burst's requests: each call of the driver gives the interpreter lock away. Granules are one page of
16 MiB, as of Llama-8B with blocks outermost; without a GPU (or with --host) of 1 MiB of the host's memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import record
from benchmarks.engines import has_gpu
from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import open_driver
from kvcached_core.geometry import make_geometry
from kvcached_core.governor import Usage
from kvcached_core.ledger import Account, Desk, Runtime
from kvcached_core.plan import Plan
from kvcached_core.pool import ElasticPool
from kvcached_core.units import MIB

GPU_PAGE, HOST_PAGE = 16 * MIB, MIB
STEP = 64  # granules: 8192 tokens of Llama-8B
GRANULES = 2 * STEP + 1  # with granule 0
BOUND_SECONDS = 30.0
_PAUSE_SECONDS = 0.0005  # as a scheduler's that waits


class Rank:
    """A pool with its account, and the scheduler's desk for it."""

    def __init__(self, runtime: Runtime, driver: Driver, page_bytes: int) -> None:
        self._account = Account.attach(
            runtime, driver.identity(), driver.memory().total_bytes, 0, instance="burst", rank=0, name="burst"
        )
        block = page_bytes // 8
        self._account.describe(
            page_bytes=page_bytes, granule_bytes=page_bytes, granule_count=GRANULES, blocks_per_granule=8,
            block_count=8 * GRANULES, stride_bytes=block,
        )  # fmt: skip
        geometry = make_geometry(page_bytes, block, (0,), 8 * GRANULES, driver.granularity_bytes)
        self._pool = ElasticPool(driver, geometry, self._account)
        self._pool.start()
        self._desk = Desk.find(runtime, "burst", 1)
        self._plans = self._released = 0

    def round(self) -> dict[str, float]:
        """Grow, take and give back; return the milliseconds of each."""
        begun = time.perf_counter()
        self._want(GRANULES)
        found = {}
        for name, held in (("first", 2), ("step", STEP + 1)):
            self._until(partial(self._holds, held))
            found[name] = _since(begun)
        taken = time.perf_counter()
        self._apply((), tuple(range(1, STEP + 1)))
        found["claim"] = _since(taken)
        self._until(partial(self._holds, GRANULES))
        found["both_steps"] = _since(begun)
        self._until(lambda: not self._pool.is_at_work)
        self._pool.check()
        given = time.perf_counter()
        self._released += GRANULES - 1
        self._want(1)
        self._apply(tuple(range(1, STEP + 1)), ())
        self._until(lambda: self._pool.stats().released == self._released)
        found["give_back"] = _since(given)
        self._until(lambda: not self._pool.is_at_work)
        return found

    def close(self) -> None:
        """Give everything back."""
        self._desk.close()
        self._pool.close()
        self._account.detach()

    def _holds(self, granules: int) -> bool:
        return self._desk.created() - self._released >= granules

    def _want(self, granules: int) -> None:
        self._desk.publish(Usage(0, 0, 0, 1, granules, granules, self._released, granules))

    def _apply(self, unmap: tuple[int, ...], mapped: tuple[int, ...]) -> None:
        self._pool.apply(Plan(self._plans, unmap, mapped, self._released))
        self._plans += 1

    @staticmethod
    def _until(done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + BOUND_SECONDS
        while not done():
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"the pool did not get there within {BOUND_SECONDS:g} s")
            time.sleep(_PAUSE_SECONDS)


def _since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000


@contextmanager
def computing() -> Iterator[None]:
    """Let a thread compute in Python for as long as this lasts."""
    stop = threading.Event()

    def compute() -> None:
        numbers: dict[int, int] = {}
        while not stop.is_set():
            for number in range(1000):
                numbers[number & 255] = number

    thread = threading.Thread(target=compute, name="computes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def measure(driver: Driver, page_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each part of each round, alone and beside a thread that computes."""
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvcached-bench-") as folder:
        rank = Rank(Runtime.open(folder), driver, page_bytes)
        try:
            rank.round()  # what is made late
            for place, context in (("alone", nullcontext), ("beside", computing)):
                for _ in range(rounds):
                    with context():
                        found = rank.round()
                    for name, value in found.items():
                        samples.setdefault(f"{place}_{name}_ms", []).append(value)
        finally:
            rank.close()
    return samples


def main(arguments: Sequence[str]) -> int:
    """Measure, write and print the medians."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.burst", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--host", action="store_true", default=not has_gpu(), help="on the CPU")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least one is needed")
    started = time.time()
    page_bytes = HOST_PAGE if options.host else GPU_PAGE
    driver = open_driver("host", 0, GRANULES * page_bytes) if options.host else open_driver("cuda")
    samples = measure(driver, page_bytes, options.rounds)
    command = ["python", "-m", "benchmarks.burst", *arguments]
    record.write(options.out, command, samples, {}, started, {"granules": GRANULES, "page_bytes": page_bytes})
    for name, values in samples.items():
        print(f"{name.removesuffix('_ms'):18} {median(values):8.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
