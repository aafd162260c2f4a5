"""Compare the cost of a block in vLLM's free queue and in the elastic one, by size of the pool.

    python -m benchmarks.micro.free_queue [--sizes N ...] [--repeats N] [--out FILE]

A sample is the time in nanoseconds to take one block and put it back, averaged over a request's blocks. The
two queues run alternately, so that a busy machine slows both. Level `queue` calls only the queue. Level
`pool` calls `BlockPool.get_new_blocks`, `touch` and `free_blocks`, as the scheduler does. In every workload,
when a request begins, another request, picked at random, ends:

    clean     ended requests leave blocks that the prefix cache does not keep
    cached    blocks stay in the prefix cache, which has room: a request hits the blocks of an earlier one
    evicting  the prefix cache is full: each block is evicted before it is taken
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from kvcached_core.scheduler.granules import Granules

SIZES = (10_000, 100_000, 1_000_000)
LEVELS = ("queue", "pool")
WORKLOADS = ("clean", "cached", "evicting")
KINDS = ("stock", "elastic")
BLOCKS_PER_GRANULE = 8
REQUEST = 32  # blocks: 512 tokens in blocks of 16
ALIVE = 64  # requests
ROUNDS = 500  # requests that come and go in one sample

Blocks = list[Any]


class PoolLevel:
    """Takes blocks and puts them back as the scheduler does."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def take(self, hit: Blocks | None) -> Blocks:
        """Take the blocks in `hit` from the prefix cache; without a hit, take new blocks."""
        if hit is None:
            return self.pool.get_new_blocks(REQUEST)  # type: ignore[no-any-return]
        self.pool.touch(hit)
        return hit

    def put(self, blocks: Blocks) -> None:
        """Put back a request's blocks; the blocks that are to be evicted first come first."""
        self.pool.free_blocks(blocks)

    def settle(self, taken: Blocks, put: Blocks, hit: bool) -> None:
        """Do nothing: the pool has done this work already."""


class QueueLevel:
    """Calls the queue alone; the rest of the pool's work is done outside the measured time."""

    def __init__(self, pool: Any, hashed: bool) -> None:
        self.pool = pool
        self.queue = pool.free_block_queue
        self.put = self.queue.append_n if hashed else self.queue.prepend_n

    def take(self, hit: Blocks | None) -> Blocks:
        """Take the blocks in `hit` out of the middle of the queue; without a hit, take from its front."""
        if hit is None:
            return self.queue.popleft_n(REQUEST)  # type: ignore[no-any-return]
        for block in hit:
            self.queue.remove(block)
        return hit

    def settle(self, taken: Blocks, put: Blocks, hit: bool) -> None:
        """Do the rest of the pool's work."""
        for block in taken:
            if not hit:
                self.pool._maybe_evict_cached_block(block)
            block.ref_cnt = 1
        for block in put:
            block.ref_cnt = 0


class Bench:
    """One pool under one workload. Samples of both levels may follow each other in any order."""

    def __init__(self, size: int, kind: str, workload: str) -> None:
        self._hashed = workload != "clean"
        self._hashes = count()
        self._random = random.Random(size)
        pool = _make_pool(size, elastic=kind == "elastic")
        self._pool = pool
        self._levels: dict[str, QueueLevel | PoolLevel] = {
            "queue": QueueLevel(pool, self._hashed),
            "pool": PoolLevel(pool),
        }
        requests = {"clean": 0, "cached": ALIVE, "evicting": (size - BLOCKS_PER_GRANULE) // REQUEST - ALIVE}[
            workload
        ]
        old = [self._hash(pool.get_new_blocks(REQUEST)) for _ in range(requests)]
        self._alive = [self._hash(pool.get_new_blocks(REQUEST)) for _ in range(ALIVE)]
        for blocks in old:
            pool.free_blocks(blocks)
        if workload == "evicting":
            pool.get_new_blocks(pool.get_num_free_blocks() - requests * REQUEST)
        # The blocks of requests in the prefix cache, oldest first; new requests hit them in this order.
        self._old = deque(old if workload == "cached" else [])

    def sample(self, level_name: str) -> float:
        """Return the nanoseconds to take one block and put it back."""
        level, clock = self._levels[level_name], time.perf_counter
        spent = 0.0
        for _ in range(ROUNDS):
            place = self._random.randrange(ALIVE)
            ending = self._alive[place][::-1]
            hit = self._old.popleft() if self._old else None
            begin = clock()
            taken = level.take(hit)
            level.put(ending)
            spent += clock() - begin
            level.settle(taken, ending, hit is not None)
            if hit is None:
                self._hash(taken)
            else:
                self._old.append(ending)
            self._alive[place] = taken
        return spent / ROUNDS / REQUEST * 1e9

    def _hash(self, blocks: Blocks) -> Blocks:
        """Enter blocks into the prefix cache under new hashes, if the workload has one."""
        if self._hashed:
            for block in blocks:
                self._pool._insert_block_hash(next(self._hashes).to_bytes(36, "big"), block, num_tokens=None)
        return blocks


def _make_pool(size: int, elastic: bool) -> Any:
    """Return a pool of `size` blocks, with memory for all of them."""
    from vllm.v1.core.block_pool import BlockPool

    from vllm_kvcached.queue import ElasticFreeQueue

    pool = BlockPool(size, enable_caching=True, hash_block_size=16)
    if elastic:
        first_blocks = range(0, size - BLOCKS_PER_GRANULE + 1, BLOCKS_PER_GRANULE)
        granules: Granules[Any] = Granules(pool.blocks, first_blocks, BLOCKS_PER_GRANULE)
        granules.set_budget(len(first_blocks))
        pool.free_block_queue = ElasticFreeQueue(pool, granules)
    return pool


def measure(sizes: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Return the samples, in nanoseconds a block, by `level.workload.size.kind`."""
    samples: dict[str, list[float]] = {}
    for size, workload in product(sizes, WORKLOADS):
        benches = {kind: Bench(size, kind, workload) for kind in KINDS}
        with _quiet():
            for _ in range(repeats + 1):
                for level, kind in product(LEVELS, KINDS):
                    found = samples.setdefault(f"{level}.{workload}.{size}.{kind}", [])
                    found.append(benches[kind].sample(level))
        for level, kind in product(LEVELS, KINDS):
            samples[f"{level}.{workload}.{size}.{kind}"].pop(0)  # the first one warmed the caches
    return samples


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the garbage collector, which would visit every block; engines freeze it too."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def draw(samples: dict[str, list[float]], sizes: Sequence[int], path: Path) -> None:
    """Draw the medians of all samples over the size of the pool as PNG, one panel for each level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for panel, level in zip(figure.subplots(1, len(LEVELS)), LEVELS, strict=True):
        for (at, workload), kind in product(enumerate(WORKLOADS), KINDS):
            panel.plot(
                sizes,
                [median(samples[f"{level}.{workload}.{size}.{kind}"]) for size in sizes],
                color=f"C{at}",
                linestyle="-" if kind == "elastic" else "--",
                marker="o" if kind == "elastic" else "s",
                label=f"{workload}, {kind}",
            )
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.set_xlabel("blocks in the pool")
        panel.set_ylabel("ns to take and put back one block")
        panel.set_title({"queue": "the queue alone", "pool": "through vLLM's block pool"}[level])
    figure.axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, write and draw the result; returns the exit status."""
    parser = options_of.parser("micro.free_queue", __doc__, "free_queue.json", options_of.PICTURE_TOO)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="blocks in the pools")
    parser.add_argument("--repeats", type=int, default=31, help="samples of each case")
    options = parser.parse_args(arguments)
    least = 4 * ALIVE * REQUEST
    if min(options.sizes) < least or options.repeats < 1:
        parser.error(f"expected sizes of at least {least} blocks, and at least one repeat")
    started = time.time()
    samples = measure(options.sizes, options.repeats)
    cases = [f"{level}.{work}.{size}" for level, work, size in product(LEVELS, WORKLOADS, options.sizes)]
    ratios = {case: record.Ratio(f"{case}.elastic", f"{case}.stock") for case in cases}
    command = ["python", "-m", "benchmarks.micro.free_queue", *arguments]
    notes = {
        "unit": "nanoseconds to take and put back one block",
        "blocks_per_request": REQUEST,
        "requests_alive": ALIVE,
        "blocks_per_granule": BLOCKS_PER_GRANULE,
    }
    record.write(options.out, command, samples, ratios, started, notes)
    draw(samples, options.sizes, options.out.with_suffix(".png"))
    for case in cases:
        stock, elastic = (median(samples[f"{case}.{kind}"]) for kind in KINDS)
        print(f"{case:24} {stock:6.0f} ns stock, {elastic:6.0f} ns elastic: {elastic / stock:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
