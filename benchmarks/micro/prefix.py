"""Compare a prefix cache's hit rate after x % of its memory was reclaimed with a cache that is x % smaller.

    python -m benchmarks.micro.prefix [--seeds N] [--out FILE]

Both caches are vLLM's own KVCacheManager and BlockPool, on the CPU and without a model. `reclaimed` has the
elastic queue: when it is full, the governor makes it hold x % less. `stock` has the smaller size from the
beginning. Both serve the same trace. An `idle` giver (the engine that gives up memory) has no requests at the
reclaim, a `busy` giver has 16. Until a busy giver has shrunk to its new size, its oldest requests end and no
request begins.

A prompt begins with one of many system prompts (chosen by Zipf's law, of four lengths) and goes on with its
own text; some prompts continue an earlier conversation with its answers. The hit rate is cached tokens over
prompt tokens, for the 100 requests `right_after` the reclaim and for the `later` requests.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from benchmarks.plots.ledger import prefix
from devkit.statistics import ratio
from kvcached_core.scheduler.granules import Granules

PERCENTS = (10, 25, 50, 75)
GIVERS, KINDS, WHENS = ("idle", "busy"), ("stock", "reclaimed"), ("right_after", "later")
BLOCK_TOKENS, BLOCKS_PER_GRANULE, BLOCKS = 16, 8, 8192
FAMILIES, PREFIXES = 150, (16, 32, 64, 128)  # system prompts, and their lengths in blocks
QUESTIONS, ANSWERS = (4, 8, 16, 32), (4, 8, 16)  # blocks
CONTINUES, REMEMBERED = 0.3, 64  # chance to continue one of the latest conversations
ALIVE = 16  # requests at once
WARM, RIGHT_AFTER, LATER = 1200, 100, 500  # requests
WINDOW, BEFORE = 25, 8  # requests of one point in the picture, and points before the reclaim
GOAL = 0.9


Samples = dict[str, list[float]]


class Item(NamedTuple):
    """A request: the hashes of all its blocks, and the number of blocks of its prompt."""

    contents: list[bytes]
    prompt_blocks: int


class Found(NamedTuple):
    """Token counts of one request: cached tokens, and tokens of the prompt."""

    hit: int
    prompt: int


def trace(seed: int, length: int) -> list[Item]:
    """Return requests; the same seed always gives the same requests."""
    draw, numbers = random.Random(seed), itertools.count(1)

    def fresh(blocks: int) -> list[bytes]:
        return [next(numbers).to_bytes(32, "big") for _ in range(blocks)]

    systems = [fresh(draw.choice(PREFIXES)) for _ in range(FAMILIES)]
    weights = [1 / (rank + 1) for rank in range(FAMILIES)]
    talks: deque[list[bytes]] = deque(maxlen=REMEMBERED)
    items = []
    for _ in range(length):
        continues = bool(talks) and draw.random() < CONTINUES
        before = draw.choice(talks) if continues else draw.choices(systems, weights)[0]
        prompt = before + fresh(draw.choice(QUESTIONS))
        contents = prompt + fresh(draw.choice(ANSWERS))
        if len(contents) < 2 * max(PREFIXES):
            talks.append(contents)
        items.append(Item(contents, len(prompt)))
    return items


class Cache:
    """A manager of `blocks` blocks, with vLLM's own queue or the elastic one."""

    def __init__(self, blocks: int, elastic: bool) -> None:
        self._manager = _manager(blocks)
        self.alive: deque[Any] = deque()
        self._contents: dict[str, list[bytes]] = {}
        self._numbers = itertools.count()
        self._granules: Granules[Any] | None = None
        if elastic:
            from vllm_kvcached.queue import ElasticFreeQueue

            pool = self._manager.block_pool
            first_blocks = range(0, blocks, BLOCKS_PER_GRANULE)
            self._granules = Granules(pool.blocks, first_blocks, BLOCKS_PER_GRANULE)
            self._granules.set_budget(len(first_blocks))
            pool.free_block_queue = ElasticFreeQueue(pool, self._granules)

    def serve(self, item: Item) -> Found:
        """Admit a request once fewer than ALIVE requests run; return how many prompt tokens were cached."""
        while len(self.alive) >= ALIVE:
            self._advance()
        request = self._request(item)
        computed = self._manager.get_computed_blocks(request)
        hit = int(computed[1])
        self._allocate(request, request.num_tokens - hit, hit, computed[0])
        self.alive.append(request)
        return Found(hit, item.prompt_blocks * BLOCK_TOKENS)

    def end_oldest(self) -> None:
        """End the oldest request; its blocks stay in the prefix cache."""
        self._end(self.alive[0])

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, plus block 0. Only for an elastic cache."""
        assert self._granules is not None
        return self._granules.used_blocks

    @property
    def blocks_of_busy(self) -> int:
        """All blocks of the granules with a used block, which cannot be given up."""
        assert self._granules is not None
        return self._granules.busy * BLOCKS_PER_GRANULE

    def reclaim(self, blocks: int) -> int:
        """Give up memory until `blocks` blocks are left; return how many requests had to end first."""
        assert self._granules is not None
        most, ended = blocks // BLOCKS_PER_GRANULE, 0
        queue = self._manager.block_pool.free_block_queue
        while True:
            self._granules.shrink(most, queue.evict)
            if self._granules.mapped <= most:
                break
            self.end_oldest()
            ended += 1
        self._granules.set_budget(most)
        queue.settle()
        queue.check()
        return ended

    def _advance(self) -> None:
        """Let each request's answer grow by a block, as steps do; end requests whose answer is complete."""
        for request in list(self.alive):
            if request.num_tokens < len(self._contents[request.request_id]) * BLOCK_TOKENS:
                request.append_output_token_ids([0] * BLOCK_TOKENS)
                self._allocate(request, BLOCK_TOKENS)
            else:
                self._end(request)

    def _allocate(self, request: Any, tokens: int, *computed: Any) -> None:
        if self._manager.allocate_slots(request, tokens, *computed) is None:
            raise RuntimeError("the pool is too small for this trace")
        request.num_computed_tokens = request.num_tokens

    def _end(self, request: Any) -> None:
        self.alive.remove(request)
        self._manager.free(request)
        del self._contents[request.request_id]

    def _request(self, item: Item) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        name = f"request-{next(self._numbers)}"
        self._contents[name] = item.contents
        return Request(
            name, [0] * (item.prompt_blocks * BLOCK_TOKENS), SamplingParams(max_tokens=1), None,
            block_hasher=self._hashes,
        )  # fmt: skip

    def _hashes(self, request: Any) -> list[bytes]:
        full = request.num_tokens // BLOCK_TOKENS
        return self._contents[request.request_id][len(request.block_hashes) : full]


def _manager(blocks: int) -> Any:
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    longest = (4 * max(PREFIXES)) * BLOCK_TOKENS
    return KVCacheManager(config, longest, BLOCK_TOKENS, BLOCK_TOKENS)


def measure(seeds: int) -> Samples:
    """Return hit rates: by `giver.percent.when.kind`, one for each seed, and by window, over all seeds."""
    samples: Samples = {}
    windows: dict[str, list[list[Found]]] = {}
    for seed, giver, percent in itertools.product(range(seeds), GIVERS, PERCENTS):
        items = trace(seed, WARM + RIGHT_AFTER + LATER)
        for kind in KINDS:
            found = _play(items, giver, percent, kind, samples)
            parts = {"right_after": found[WARM : WARM + RIGHT_AFTER], "later": found[WARM + RIGHT_AFTER :]}
            for when, part in parts.items():
                samples.setdefault(f"{giver}.{percent}.{when}.{kind}", []).append(_rate(part))
            drawn = list(_windows(found[WARM - BEFORE * WINDOW :]))
            for window, part in zip(
                windows.setdefault(f"{giver}.{percent}.windows.{kind}", [[] for _ in drawn]),
                drawn,
                strict=True,
            ):
                window += part
    return samples | {name: [_rate(part) for part in parts] for name, parts in windows.items()}


def _play(items: Sequence[Item], giver: str, percent: int, kind: str, samples: Samples) -> list[Found]:
    """Serve a trace; return the token counts of each request, and add the reclaim's figures to `samples`."""
    left = BLOCKS * (100 - percent) // 100 // BLOCKS_PER_GRANULE * BLOCKS_PER_GRANULE
    cache = Cache(BLOCKS if kind == "reclaimed" else left, elastic=kind == "reclaimed")
    found = [cache.serve(item) for item in items[:WARM]]
    while giver == "idle" and cache.alive:
        cache.end_oldest()
    if kind == "reclaimed":
        samples.setdefault(f"{giver}.{percent}.blocks_of_busy_granules", []).append(cache.blocks_of_busy)
        samples.setdefault(f"{giver}.{percent}.used_blocks", []).append(cache.used_blocks)
        samples.setdefault(f"{giver}.{percent}.requests_ended", []).append(cache.reclaim(left))
    return found + [cache.serve(item) for item in items[WARM:]]


def _windows(found: list[Found]) -> Iterator[list[Found]]:
    for at in range(0, len(found), WINDOW):
        yield found[at : at + WINDOW]


def _rate(found: Sequence[Found]) -> float:
    return sum(one.hit for one in found) / sum(one.prompt for one in found)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, write and draw the result; returns 1 if the goal is missed."""
    parser = options_of.parser("micro.prefix", __doc__, "prefix.json", options_of.PICTURE_TOO)
    parser.add_argument("--seeds", type=int, default=5, help="number of traces")
    options = parser.parse_args(arguments)
    started = time.time()
    samples = measure(options.seeds)
    ratios = {
        case: record.Ratio(f"{case}.reclaimed", f"{case}.stock", "mean")
        for case in (f"{giver}.{x}.{when}" for giver, x, when in itertools.product(GIVERS, PERCENTS, WHENS))
    }
    notes = {
        "goal": GOAL, "blocks": BLOCKS, "blocks_per_granule": BLOCKS_PER_GRANULE, "window_requests": WINDOW,
        "right_after_requests": RIGHT_AFTER, "windows_before": BEFORE,
    }  # fmt: skip
    command = ["python", "-m", "benchmarks.micro.prefix", *arguments]
    record.write(options.out, command, samples, ratios, started, notes)
    found = {
        name: ratio(samples[of.numerator], samples[of.denominator], of.statistic)
        for name, of in ratios.items()
    }
    prefix({"samples": samples, "notes": notes, "ratios": found}, options.out.with_suffix(".png"))
    for name, value in found.items():
        print(f"{name:22} {value:.3f} of stock's hit rate{'' if value >= GOAL else ': the goal is missed'}")
    return int(min(found.values()) < GOAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
