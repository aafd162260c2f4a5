"""A scheduler with both pools of a model with sliding windows, and its requests."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_kvcached.pools import ElasticMHATokenToKVPool
from sglang_kvcached.swa import ElasticSWAAllocator
from tests.sglang.elastic import (
    HEAD_DIM,
    HEADS,
    LAID_PAGE_BYTES,
    Cache,
    Engine,
    request,
    touch,
)

FULL_SLOTS, SWA_SLOTS = 1536, 768


FULL_LAYERS, SWA_LAYERS = [0, 3], [1, 2, 4]


WINDOW = 64


class SlidingCache(Cache):
    """Keeps whole requests in both pools."""

    def supports_swa(self) -> bool:
        """Say yes."""
        return True

    def full_evictable_size(self) -> int:
        """Return the number of slots that are kept."""
        return sum(len(slots) for slots in self.lent)

    def swa_evictable_size(self) -> int:
        """Return the number of kept slots of the window's pool."""
        mapping = self.allocator.full_to_swa_index_mapping
        return sum(int((mapping[slots] > 0).sum()) for slots in self.lent)

    def evict(self, params: Any) -> Any:
        """Free at least these numbers of slots in both pools, or all."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictResult

        full = sliding = 0
        while self.lent and (
            full < params.num_tokens or (sliding < params.swa_num_tokens and self.swa_evictable_size())
        ):
            slots = self.lent.pop(0)
            inside = self.allocator.full_to_swa_index_mapping[slots] > 0
            full += len(slots)
            sliding += int(inside.sum())
            self.allocator.free_full(slots[~inside])
            self.allocator.free(slots[inside])
        return EvictResult(num_tokens_evicted=full, swa_num_tokens_evicted=sliding)


def pool(cls: type, page_size: int) -> SWAKVPool:
    """Return both pools."""
    return SWAKVPool(
        FULL_SLOTS, SWA_SLOTS, page_size, torch.float32, HEADS, HEAD_DIM, SWA_LAYERS, FULL_LAYERS, "cpu",
        token_to_kv_pool_class=cls,
    )  # fmt: skip


def begun(made: Engine) -> ElasticSWAAllocator:
    """Return the elastic allocator of both pools, with its scheduler memory made."""
    made.cache = made.scheduler.tree_cache = SlidingCache()
    made.cache.sliding_window_size = WINDOW
    kvcache = pool(ElasticMHATokenToKVPool, made.page_size)
    both = ElasticSWAAllocator(FULL_SLOTS, SWA_SLOTS, made.page_size, torch.float32, "cpu", kvcache, False)
    made.begin(both)
    return both


def lay(made: Engine, layout: str) -> None:
    """Choose a layout; with two pools `block` is the same as `layer`, as they share a physical page size."""
    made.context.lay(layout, LAID_PAGE_BYTES["layer" if layout == "block" else layout])


class Requests:
    """Requests whose older slots leave the window's pool as they grow."""

    def __init__(self, made: Engine) -> None:
        self.engine, self.both, self.page_size = made, begun(made), made.page_size
        self.all: list[torch.Tensor] = []
        self.left: list[int] = []  # how many of the first slots have left the window

    def begin(self, tokens: int) -> bool:
        """Admit a request if there is room."""
        budget = self.both.create_prefill_budget(self.engine.cache)
        fits, _ = budget.check_prefill(
            extend_input_len=tokens, total_tokens=tokens + 2 * self.page_size, input_tokens=tokens,
            chunk_limit=None, max_new_tokens=1, swa_host_hit_length=0,
        )  # fmt: skip
        if fits:
            self._take(tokens)
        return bool(fits)

    def chunk(self, tokens: int) -> int:
        """Begin a request with as much of a long prompt as fits into this step; return its tokens."""
        fits = self.both.create_prefill_budget(self.engine.cache).available_chunk_tokens(tokens) or 0
        if fits:
            self._take(fits)
        return int(fits)

    def _take(self, tokens: int) -> None:
        self.both.evict_to_free_tokens(self.engine.cache, tokens + self.page_size)
        if self.page_size == 1:
            slots = self.both.alloc(tokens)
        else:
            none, length = torch.tensor([0]), torch.tensor([tokens])
            slots = self.both.alloc_extend(none, none, length, length, torch.tensor([-1]), tokens)
        assert slots is not None
        self.all.append(slots)
        self.left.append(0)
        self.engine.scheduler.running_batch.reqs = [request()] * len(self.all)

    def decode(self) -> None:
        """Give each request another slot and move its window; retract the last one until they fit."""
        while self.all:
            lengths = torch.tensor([len(slots) + 1 for slots in self.all])
            pages = int(((lengths - 1) % self.page_size == 0).sum())
            if self.both.check_decode_capacity(
                num_tokens=pages * self.page_size, tree_cache=self.engine.cache, requests=self.all
            ):
                break
            self.end(len(self.all) - 1, keep=False)
        else:
            return
        if self.page_size == 1:
            taken = self.both.alloc(len(self.all))
        else:
            taken = self.both.alloc_decode(lengths, lengths, torch.stack([slots[-1] for slots in self.all]))
        assert taken is not None
        self.all = [torch.cat([slots, taken[i : i + 1]]) for i, slots in enumerate(self.all)]
        for at, slots in enumerate(self.all):
            gone = max(0, len(slots) - WINDOW) // self.page_size * self.page_size
            if gone > self.left[at]:
                self.both.free_swa(slots[self.left[at] : gone])
                self.left[at] = gone

    def end(self, at: int, keep: bool) -> None:
        """End a request; with `keep` the cache keeps its slots if it can."""
        slots = self.all.pop(at % len(self.all))
        left = self.left.pop(at % (len(self.left) or 1))
        if keep and not left and len(slots) % self.page_size == 0:
            self.engine.cache.lend(slots)
        else:
            self.both.free_full(slots[:left])
            self.both.free(slots[left:])
        self.engine.scheduler.running_batch.reqs = [request()] * len(self.all)

    def check(self) -> None:
        """Assert that held slots have memory in both pools and the accounting adds up."""
        mine = torch.cat([*self.all, *self.engine.cache.lent, torch.tensor([0])])
        assert len(mine.unique()) == len(mine)
        kvcache = self.both.get_kvcache()
        touch(kvcache.full_kv_pool, mine)
        window = self.both.full_to_swa_index_mapping[mine]
        touch(kvcache.swa_kv_pool, window[window > 0])
        self.engine.memory.check()
