"""SGLang's pools over elastic memory: they have the shapes of stock, and refuse unsupported models."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool, MLATokenToKVPool

from kvcached_core.errors import ConfigError, InvariantError, UnsupportedError
from kvcached_core.units import GIB
from sglang_kvcached import startup_check
from sglang_kvcached.allocators import ElasticPagedAllocator, ElasticTokenAllocator
from sglang_kvcached.pools import ElasticMHATokenToKVPool, ElasticMLATokenToKVPool, reservation_of
from tests.sglang.elastic import HEAD_DIM, HEADS, LAYERS, engine, mha_pool, mla_pool
from tests.sglang.twins import KINDS, Twins, begun

SLOTS = 1024


def buffers(pool: Any) -> list[torch.Tensor]:
    """Return all buffers of a pool."""
    return [*pool.k_buffer, *pool.v_buffer] if hasattr(pool, "k_buffer") else list(pool.kv_buffer)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("make", "stock", "elastic"),
    [
        (mha_pool, MHATokenToKVPool, ElasticMHATokenToKVPool),
        (mla_pool, MLATokenToKVPool, ElasticMLATokenToKVPool),
    ],
)
def test_buffers_have_the_shape_strides_and_kind_of_stock(
    make: Any, stock: type, elastic: type, page_size: int, tmp_path: Path
) -> None:
    expected = buffers(make(stock, SLOTS, page_size))
    with engine(tmp_path, page_size):
        found = buffers(make(elastic, SLOTS, page_size))
        assert [(b.shape, b.stride(), b.dtype, b.device) for b in found] == [
            (b.shape, b.stride(), b.dtype, b.device) for b in expected
        ]
        for number, buffer in enumerate(found):
            assert int(buffer[:page_size].count_nonzero()) == 0
            buffer[:page_size] = number + 1
        for number, buffer in enumerate(found):
            assert bool((buffer[:page_size] == number + 1).all())


def test_usage_is_the_held_memory(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        twins = Twins(made, KINDS["mha-16"])
        pool = twins.elastic.get_kvcache()
        assert pool.mem_usage * GIB == made.rank_memory.held_bytes == made.context.account.granule_bytes
        twins.begin(500)
        assert pool.mem_usage * GIB == made.rank_memory.held_bytes > 4 * made.context.account.granule_bytes


def test_the_log_names_reserved_and_held_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with engine(tmp_path, 16), caplog.at_level(logging.INFO):
        mha_pool(ElasticMHATokenToKVPool, SLOTS, 16)
    assert "KV Cache is reserved (kvcached): #tokens: 1024, 576 KiB of addresses, 64 KiB held" in caplog.text


@pytest.mark.parametrize("kind", ["mha-16", "mha-16-layer", "mha-16-block"])
def test_a_draft_models_pool_is_stock(kind: str, tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        begun(made, KINDS[kind])
        held = made.rank_memory.held_bytes
        draft = mha_pool(ElasticMHATokenToKVPool, SLOTS, 16)
        assert draft.kv_reservation is None and draft.mem_usage > 0
        assert draft.k_buffer[0].is_contiguous() and len(draft.data_ptrs) == 2 * LAYERS
        draft.k_buffer[0][SLOTS] = 1.0  # every slot has memory
        assert made.rank_memory.held_bytes == held


def test_the_full_attention_part_of_a_hybrid_pool_is_elastic(tmp_path: Path) -> None:
    with engine(tmp_path, 1) as made:
        hybrid = HybridLinearKVPool(
            size=SLOTS, dtype=torch.float32, page_size=1, head_num=HEADS, head_dim=HEAD_DIM,
            full_attention_layer_ids=list(range(LAYERS)), device="cpu",
            mamba_pool=SimpleNamespace(mamba_cache=None), full_kv_pool_class=ElasticMHATokenToKVPool,
        )  # fmt: skip
        owner = ElasticTokenAllocator(
            SLOTS, dtype=torch.float32, device="cpu", kvcache=hybrid, need_sort=False
        )
        made.begin(owner)
        budget = owner.create_prefill_budget(made.cache)
        fits, _ = budget.check_prefill(
            extend_input_len=300, total_tokens=301, input_tokens=300, chunk_limit=None, max_new_tokens=1,
            swa_host_hit_length=0,
        )  # fmt: skip
        assert fits and owner.alloc(300) is not None
        assert reservation_of(hybrid).page_pool.owned == 300


def test_a_stock_pool_is_refused_by_an_elastic_allocator(tmp_path: Path) -> None:
    with (
        engine(tmp_path, 16),
        pytest.raises(UnsupportedError, match="pool MHATokenToKVPool is not supported"),
    ):
        ElasticPagedAllocator(
            SLOTS, page_size=16, dtype=torch.float32, device="cpu", need_sort=False,
            kvcache=mha_pool(MHATokenToKVPool, SLOTS, 16),
        )  # fmt: skip


def test_two_pools_without_an_owner_are_refused(tmp_path: Path) -> None:
    with engine(tmp_path, 16):
        mha_pool(ElasticMHATokenToKVPool, SLOTS, 16)
        with pytest.raises(InvariantError, match="second KV pool"):
            mha_pool(ElasticMHATokenToKVPool, SLOTS, 16)


def test_keys_and_values_of_different_shapes_are_refused(tmp_path: Path) -> None:
    with engine(tmp_path, 1), pytest.raises(UnsupportedError, match=r"keys of shape \(2, 16\)"):
        ElasticMHATokenToKVPool(
            SLOTS, page_size=1, dtype=torch.float32, head_num=HEADS, head_dim=HEAD_DIM, v_head_dim=8,
            layer_num=LAYERS, device="cpu", enable_memory_saver=False,
        )  # fmt: skip


def test_a_limit_below_one_request_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with engine(tmp_path, 16, longest_tokens=1000) as made:
        made.context.limit_bytes = lambda: 128 * 1024  # type: ignore[method-assign]
        with pytest.raises(
            ConfigError, match="128 KiB is less than the 512 KiB that one request of 1000 tokens"
        ):
            mha_pool(ElasticMHATokenToKVPool, SLOTS, 16)


def test_a_scheduler_that_is_not_elastic_is_recognized(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        stock = SimpleNamespace(get_kvcache=lambda: None)
        scheduler = SimpleNamespace(token_to_kv_pool_allocator=stock)
        assert startup_check.why_not_elastic(scheduler) == "its KV pool is NoneType"
        begun(made, KINDS["mha-16"])
        assert startup_check.why_not_elastic(scheduler) == ""
