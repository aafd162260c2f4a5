"""Full attention and sliding window: two pools, two allocators, one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.allocator import swa as stock_site
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.platforms import current_platform

from sglang_kvcached.allocators import ElasticPagedAllocator
from sglang_kvcached.hooks import rebind_allocators
from sglang_kvcached.pools import ElasticMHATokenToKVPool
from sglang_kvcached.swa import ElasticSWAAllocator
from tests.sglang.elastic import (
    HEAD_DIM,
    HEADS,
    IDLE_SECONDS,
    LAID_PAGE_BYTES,
    Cache,
    Engine,
    engine,
    request,
    touch,
)

FULL_SLOTS, SWA_SLOTS = 1536, 768
FULL_LAYERS, SWA_LAYERS = [0, 3], [1, 2, 4]
WINDOW = 64


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build allocators as in a scheduler: the late rebinds, and the platform's paged allocator."""
    for module in (kv_cache_configurator, stock_site):
        for name in ("TokenToKVPoolAllocator", "SWATokenToKVPoolAllocator", "PureSWATokenToKVPoolAllocator"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    rebind_allocators()
    monkeypatch.setattr(type(current_platform), "get_paged_allocator_cls", lambda self: ElasticPagedAllocator)


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


MOVE = st.tuples(
    st.sampled_from(["begin", "begin", "chunk", "decode", "decode", "end", "keep", "limit", "idle", "flush"]),
    st.integers(1, 200),
)


@pytest.mark.parametrize("layout", ["engine", "layer", "block"])
@pytest.mark.parametrize("page_size", [1, 16])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVE, max_size=20))
def test_i5_i9_held_slots_have_memory_in_both_pools(
    page_size: int, layout: str, tmp_path: Path, moves: list[tuple[str, int]]
) -> None:
    with engine(tmp_path, page_size) as made:
        lay(made, layout)
        requests = Requests(made)
        for name, number in moves:
            if name == "begin":
                requests.begin(number)
            elif name == "chunk":
                requests.chunk(3 * number)
            elif name == "decode":
                for _ in range(number % 80):
                    requests.decode()
            elif name in ("end", "keep") and requests.all:
                requests.end(number, keep=name == "keep")
            elif name == "limit":
                made.limit(20 + number)
            elif name == "idle" and not requests.all:
                made.idle(number / 50)
            elif name == "flush" and not requests.all:
                made.cache.lent.clear()
                requests.both.clear()
            requests.check()


@pytest.mark.parametrize("layout", ["engine", "layer", "block"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_both_pools_grow_and_shrink_in_ledger_granules(page_size: int, layout: str, tmp_path: Path) -> None:
    with engine(tmp_path, page_size) as made:
        lay(made, layout)
        requests = Requests(made)
        buffers = 2 if layout == "engine" else 1
        first = buffers * (len(FULL_LAYERS) + len(SWA_LAYERS))  # a physical page of every buffer
        assert made.mapped == made.held() == first
        for _ in range(3):
            assert requests.begin(200)
        assert 4 * first < made.mapped <= made.held()
        while requests.all:
            requests.end(0, keep=False)
        made.idle()
        made.idle(IDLE_SECONDS + 0.1)
        assert made.mapped == made.held() == first


def test_a_prompt_waits_for_one_pool_though_granules_of_the_other_are_empty(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        requests = Requests(made)
        assert requests.begin(512)
        requests.decode()  # most of it leaves the window
        made.now += 60.0  # so the next step searches for empty granules
        made.memory.settle()
        full, sliding = made.memory.accounting.page_pools
        assert full.empty == 0 and sliding.empty > 0
        assert requests.begin(112)
        requests.check()


def test_a_chunk_fits_into_the_memory_of_both_pools_together(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        requests = Requests(made)
        full, sliding = made.memory.accounting.page_pools
        made.limit(
            made.mapped + max(full.ledger_granules_each, sliding.ledger_granules_each)
        )  # one more granule of either, not of both
        pages = min(full.free, sliding.free)
        assert requests.chunk(400) == (pages - 1) * 16, "one page stays free, as in stock"
        requests.check()


def test_i5_a_pool_with_cached_pages_makes_room_for_the_other_pool(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        requests = Requests(made)
        full, sliding = made.memory.accounting.page_pools
        assert requests.begin(496)
        made.cache.lend(requests.all.pop())
        requests.left.pop()
        requests.both.free_swa(made.cache.lent[0])
        made.memory.prefix_cache.count()
        assert (full.cached_pages, sliding.cached_pages) == (31, 0)
        pages = sliding.free + 2
        accounting = made.memory.accounting
        new = full.ledger_granules_towards(pages - full.free)
        accounting.set_budget(
            made.mapped + new + sliding.ledger_granules_each - 1
        )  # enough for the first pool, nothing for the other
        assert accounting.missing_pages([pages] * 2) == [0, 2]
        requests.both.evict_to_free_tokens(made.cache, pages * 16)
        assert not made.cache.lent and accounting.missing_pages([pages] * 2) == [0, 0]


def test_both_pools_shrink_for_a_lower_limit(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        requests = Requests(made)
        for _ in range(3):
            assert requests.begin(192)
        requests.end(0, keep=True)
        limit = 40  # three granules of each pool, and the first ones
        made.limit(limit)
        requests.decode()
        made.turn()
        assert made.held() <= limit and len(requests.all) == 1 and not made.cache.lent
        requests.check()


def test_i9_available_size_counts_unmapped_slots_as_in_stock(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        requests = Requests(made)
        assert requests.begin(150)
        sizes = (requests.both.full_available_size(), requests.both.swa_available_size())
    assert sizes == (FULL_SLOTS - 160, SWA_SLOTS - 160)
