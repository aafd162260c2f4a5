"""vLLM's block pools, with vLLM's free queue and with the elastic free queue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from kvcached_core.scheduler.granules import Granules
from vllm_kvcached.queue import ElasticFreeQueue

SIZE = 4  # blocks of a granule


def stock_pool(blocks: int) -> Any:
    """Return a pool with prefix caching and KV events."""
    return BlockPool(blocks, enable_caching=True, hash_block_size=16, enable_kv_cache_events=True)


def elastic_pool(granules: int, budget: int | None = None, size: int = SIZE) -> Any:
    """Return a pool with an elastic queue and this many granules; `budget` of them may be mapped."""
    pool = stock_pool(granules * size)
    under = Granules(pool.blocks, range(0, granules * size, size), size)
    under.set_budget(granules if budget is None else budget)
    pool.free_block_queue = ElasticFreeQueue(pool, under)
    return pool


def granules_of(pool: Any) -> Granules[Any]:
    """Return the granules under an elastic pool."""
    under: Granules[Any] = pool.free_block_queue._granules
    return under


def settle(pool: Any, granules: int) -> None:
    """Set the number of granules that an elastic pool may map, as is done between two steps."""
    granules_of(pool).shrink(granules, pool.free_block_queue.evict)
    granules_of(pool).set_budget(granules)
    pool.free_block_queue.settle()


def content(number: int) -> bytes:
    """Return a made-up hash of a block's tokens."""
    return number.to_bytes(32, "big")


def cache(pool: Any, blocks: Iterable[Any], contents: Iterable[int]) -> None:
    """Put full blocks into the prefix cache."""
    for block, number in zip(blocks, contents, strict=True):
        pool._insert_block_hash(make_block_hash_with_group_id(content(number), 0), block, num_tokens=16)


def hits(pool: Any, contents: Iterable[int]) -> list[Any]:
    """Return the blocks of the longest prefix that is cached."""
    found = []
    for number in contents:
        blocks = pool.get_cached_block(content(number), [0])
        if blocks is None:
            break
        found += blocks
    return found


def removed(pool: Any) -> list[int]:
    """Return the contents that the pool's events have reported as removed since the last call."""
    events = [event for event in pool.take_events() if type(event).__name__ == "BlockRemoved"]
    keys = [key for event in events for key in event.block_hashes]
    return [key if isinstance(key, int) else int.from_bytes(key, "big") for key in keys]
