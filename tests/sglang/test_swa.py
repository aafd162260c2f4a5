"""Full attention and sliding window: two pools, two allocators, one budget."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.allocator import swa as stock_site
from sglang.srt.platforms import current_platform

from sglang_kvcached.allocators import ElasticPagedAllocator
from sglang_kvcached.hooks import rebind_allocators
from tests.sglang.elastic import (
    IDLE_SECONDS,
    engine,
)
from tests.sglang.sliding import (
    FULL_LAYERS,
    FULL_SLOTS,
    SWA_LAYERS,
    SWA_SLOTS,
    Requests,
    lay,
)


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build allocators as in a scheduler: the late rebinds, and the platform's paged allocator."""
    for module in (kv_cache_configurator, stock_site):
        for name in ("TokenToKVPoolAllocator", "SWATokenToKVPoolAllocator", "PureSWATokenToKVPoolAllocator"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    rebind_allocators()
    monkeypatch.setattr(type(current_platform), "get_paged_allocator_cls", lambda self: ElasticPagedAllocator)


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
