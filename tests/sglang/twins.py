"""Requests on SGLang's own allocator and on the elastic one, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from sglang_kvcached.allocators import ElasticPagedAllocator, ElasticTokenAllocator
from sglang_kvcached.pools import ElasticMHATokenToKVPool, ElasticMLATokenToKVPool
from tests.sglang.elastic import LAID_PAGE_BYTES, Engine, mha_pool, mla_pool, odd_mla_pool, request, touch

SLOTS = 1500  # 12 granules, the last one not full
Make = Callable[[type, int, int], Any]


class Kind(NamedTuple):
    """A pool and its page size."""

    make: Make
    stock_pool: type
    elastic_pool: type
    page_size: int
    layout: str = "engine"


KINDS = {
    "mha-1": Kind(mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool, 1),
    "mha-16": Kind(mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool, 16),
    "mha-1-layer": Kind(mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool, 1, "layer"),
    "mha-16-layer": Kind(mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool, 16, "layer"),
    "mha-1-block": Kind(mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool, 1, "block"),
    "mha-16-block": Kind(mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool, 16, "block"),
    "mla-1": Kind(mla_pool, MLATokenToKVPool, ElasticMLATokenToKVPool, 1),
    "mla-16": Kind(mla_pool, MLATokenToKVPool, ElasticMLATokenToKVPool, 16),
}


STRADDLING = Kind(odd_mla_pool, MLATokenToKVPool, ElasticMLATokenToKVPool, 1)


def allocator(pool: Any, slots: int, page_size: int, elastic: bool) -> Any:
    """Return the allocator that SGLang would make for a pool."""
    common = {"dtype": torch.float32, "device": "cpu", "kvcache": pool, "need_sort": False}
    if page_size == 1:
        return (ElasticTokenAllocator if elastic else TokenToKVPoolAllocator)(slots, **common)
    kind = ElasticPagedAllocator if elastic else PagedTokenToKVPoolAllocator
    return kind(slots, page_size=page_size, **common)


def begun(made: Engine, kind: Kind, slots: int = SLOTS) -> Any:
    """Return an elastic allocator, with its scheduler memory made."""
    slots = slots // kind.page_size * kind.page_size
    made.context.lay(kind.layout, LAID_PAGE_BYTES[kind.layout])
    pool = kind.make(kind.elastic_pool, slots, kind.page_size)
    made.begin(allocator(pool, slots, kind.page_size, elastic=True))
    return made.allocator


class Twins:
    """Runs the same requests on a stock and an elastic allocator, with the calls of SGLang's scheduler."""

    def __init__(self, made: Engine, kind: Kind) -> None:
        self.engine, self.page_size = made, kind.page_size
        slots = SLOTS // kind.page_size * kind.page_size
        self.elastic = begun(made, kind)
        self.stock = allocator(
            kind.make(kind.stock_pool, slots, kind.page_size), slots, kind.page_size, False
        )
        self.requests: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # slots on the stock and on the elastic allocator

    def _each(self, take: Callable[[Any, int], torch.Tensor | None]) -> list[torch.Tensor] | None:
        """Allocate from both, and assert that both succeed or both refuse."""
        taken = [take(each, at) for at, each in enumerate((self.stock, self.elastic))]
        if taken[0] is None or taken[1] is None:
            assert taken == [None, None]
            return None
        assert len(taken[0]) == len(taken[1])
        touch(self.elastic.get_kvcache(), taken[1])
        return [taken[0], taken[1]]

    def begin(self, tokens: int) -> None:
        """Admit a request if there is room, as a prefill budget does."""
        budget = self.elastic.create_prefill_budget(self.engine.cache)
        fits, _ = budget.check_prefill(
            extend_input_len=tokens, total_tokens=tokens + self.page_size, input_tokens=tokens,
            chunk_limit=None, max_new_tokens=1, swa_host_hit_length=0,
        )  # fmt: skip
        if not fits or tokens + self.page_size > self.stock.available_size():
            return
        self.elastic.evict_to_free_tokens(self.engine.cache, tokens + self.page_size)

        def extend(each: Any, at: int) -> torch.Tensor | None:
            if self.page_size == 1:
                return each.alloc(tokens)
            none, all_of = torch.tensor([0]), torch.tensor([tokens])
            return each.alloc_extend(none, none, all_of, all_of, torch.tensor([-1]), tokens)

        taken = self._each(extend)
        assert taken is not None
        self.requests.append((taken[0], taken[1]))
        self._tell()

    def decode(self) -> None:
        """Give each request another slot; retract the last one until all fit."""
        while self.requests:
            lengths = torch.tensor([len(slots) + 1 for slots, _ in self.requests])
            pages = int(((lengths - 1) % self.page_size == 0).sum())
            rows = [request()] * len(self.requests)
            fits = self.elastic.check_decode_capacity(
                num_tokens=pages * self.page_size, tree_cache=self.engine.cache, requests=rows
            )
            if fits and pages * self.page_size <= self.stock.available_size():
                break
            self.end(len(self.requests) - 1, keep=False)
        else:
            return

        def step(each: Any, at: int) -> torch.Tensor | None:
            if self.page_size == 1:
                return each.alloc(len(self.requests))
            last = torch.stack([request[at][-1] for request in self.requests])
            return each.alloc_decode(lengths, lengths, last)

        taken = self._each(step)
        assert taken is not None
        self.requests = [
            (torch.cat([stock, taken[0][i : i + 1]]), torch.cat([elastic, taken[1][i : i + 1]]))
            for i, (stock, elastic) in enumerate(self.requests)
        ]
        self._tell()

    def end(self, at: int, keep: bool) -> None:
        """End a request; with `keep` the elastic engine's cache keeps its slots, which stock frees."""
        if not self.requests:
            return
        stock, elastic = self.requests.pop(at % len(self.requests))
        self.stock.free_segment(stock, start_pos=0)
        if keep:
            whole = len(elastic) // self.page_size * self.page_size
            self.engine.cache.lend(elastic[:whole])
            self.elastic.free_segment(elastic[whole:], start_pos=whole)
        else:
            self.elastic.free_segment(elastic, start_pos=0)
        self._tell()

    def flush(self) -> None:
        """End all requests and clear both allocators."""
        while self.requests:
            self.end(0, keep=False)
        self.engine.cache.lent.clear()
        self.stock.clear()
        before = self.engine.mapped, self.engine.held()
        self.elastic.clear()
        self.engine.turn()
        # Mapped memory stays, except above a limit that was set since the last step.
        most = self.engine.limit_granules
        assert (self.engine.mapped, self.engine.held()) == tuple(min(count, most) for count in before)

    def _tell(self) -> None:
        self.engine.scheduler.running_batch.reqs = [request()] * len(self.requests)

    def check(self) -> None:
        """Assert that sizes equal stock's, no slot is held twice, and the accounting adds up."""
        cache = self.engine.cache
        kept = sum(-(-len(slots) // self.page_size) * self.page_size for slots in cache.lent)
        assert self.elastic.available_size() + kept == self.stock.available_size()
        slots = torch.cat([*(elastic for _, elastic in self.requests), *cache.lent, torch.tensor([0])])
        assert len(slots.unique()) == len(slots)
        pages = self.elastic.get_all_free_pages()
        assert len(pages.unique()) == len(pages) == self.elastic.available_size() // self.page_size
        assert not torch.isin(slots // self.page_size, pages).any()
        self.engine.memory.check()
        touch(self.elastic.get_kvcache(), slots)
