"""Measure how long one rank waits for its memory before a burst's first step, without an engine.

    python -m benchmarks.micro.burst --out benchmarks/results/burst.json

Like a scheduler, the benchmark asks for the granules of two steps at once, waits for the granules of the
first step, maps them with a plan, and then gives all back. It does this alone, and again beside a thread that
computes in Python, like an engine's thread that unpacks requests: during each driver call that thread can
take the interpreter lock. A granule is one page of 16 MiB, as for Llama-8B in the `block` layout; without a
GPU (or with `--host`) it is 1 MiB of host memory.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from benchmarks.lib.taker import Taker
from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import open_driver
from kvcached_core.ledger import Runtime
from kvcached_core.units import MIB

GPU_PAGE, HOST_PAGE = 16 * MIB, MIB
STEP = 64  # granules of a step: 8192 tokens of Llama-8B
BLOCKS = 8  # blocks of a granule
BOUND_SECONDS = 30.0


def play(rank: Taker) -> dict[str, float]:
    """Make a rank get granules, map them and give them back; return the milliseconds of each part."""
    begun, found = time.perf_counter(), dict[str, float]()
    rank.wish()
    for name, granules in (("first", 1), ("step", STEP)):
        rank.wait_for(granules, BOUND_SECONDS)
        found[name] = _since(begun)
    taken = time.perf_counter()
    rank.map(STEP)
    found["claim"] = _since(taken)
    rank.wait_for_all(BOUND_SECONDS)
    found["both_steps"] = _since(begun)
    given = time.perf_counter()
    rank.give_back(BOUND_SECONDS)
    found["give_back"] = _since(given)
    return found


def _since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000


@contextmanager
def computing() -> Iterator[None]:
    """Run a thread that computes in Python for as long as the block lasts."""
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
        rank = Taker(Runtime.open(folder), driver, 0, page_bytes, BLOCKS, 2 * STEP)
        try:
            play(rank)  # warm up
            for place, context in (("alone", nullcontext), ("beside", computing)):
                for _ in range(rounds):
                    with context():
                        found = play(rank)
                    for name, value in found.items():
                        samples.setdefault(f"{place}_{name}_ms", []).append(value)
        finally:
            rank.close()
    return samples


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, write the result and print the medians."""
    parser = options_of.parser("micro.burst", __doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options_of.add_host(parser)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least one is needed")
    started = time.time()
    page_bytes = HOST_PAGE if options.host else GPU_PAGE
    driver = open_driver("host", 0, (1 + 2 * STEP) * page_bytes) if options.host else open_driver("cuda")
    samples = measure(driver, page_bytes, options.rounds)
    command = ["python", "-m", "benchmarks.micro.burst", *arguments]
    record.write(
        options.out, command, samples, {}, started, {"step_granules": STEP, "page_bytes": page_bytes}
    )
    for name, values in samples.items():
        print(f"{name.removesuffix('_ms'):18} {median(values):8.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
