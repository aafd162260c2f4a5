"""The layouts `layer` and `block`: which backends may use them, and that SGLang works as in stock."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.layout.paged_view import paged_kv_view
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kvcached_core.errors import UnsupportedError
from sglang_kvcached.layouts import DEFAULT, PROVEN_BACKENDS, STRIDED_BACKENDS, chosen
from sglang_kvcached.pools import ElasticMHATokenToKVPool
from tests.sglang.elastic import HEAD_DIM, HEADS, LAYERS, Engine, engine, mha_pool

SLOTS = 240  # one granule of 256 slots with page 0, all of it mapped
ROW_BYTES = HEADS * HEAD_DIM * 4


@pytest.fixture(params=[(layout, page_size) for layout in ("layer", "block") for page_size in (1, 16)])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine of each layout and page size, whose first granule has all slots of the tests."""
    layout, page_size = request.param
    with engine(tmp_path, page_size) as made:
        made.context.lay(layout, None)
        yield made


def together(made: Engine) -> int:
    """Return the number of layers in one buffer."""
    return LAYERS if made.context.layout == "block" else 1


def filled(kvcache: Any) -> Any:
    """Store different keys and values in every slot and layer, by SGLang's own method."""
    generator = torch.Generator().manual_seed(3)
    slots = torch.randperm(SLOTS, generator=generator)[:100] + 1
    for layer in range(LAYERS):
        k, v = torch.randn(2, len(slots), HEADS, HEAD_DIM, generator=generator)
        kvcache.set_kv_buffer(SimpleNamespace(layer_id=layer), slots, k, v)
    return kvcache


def pair(made: Engine, **more: Any) -> tuple[Any, Any]:
    """Return a stock pool and an elastic one with the same keys and values."""
    stock, elastic = (
        filled(mha_pool(cls, SLOTS, made.page_size, **more))
        for cls in (MHATokenToKVPool, ElasticMHATokenToKVPool)
    )
    return stock, elastic


def same(stock: Any, elastic: Any) -> None:
    """Assert that all slots of all layers are equal."""
    for layer in range(LAYERS):
        for expected, found in zip(stock.get_kv_buffer(layer), elastic.get_kv_buffer(layer), strict=True):
            assert torch.equal(expected, found)


def test_a_granule_is_a_physical_page_of_each_buffer_and_rows_of_a_slot_are_adjacent(made: Engine) -> None:
    kvcache, each = mha_pool(ElasticMHATokenToKVPool, SLOTS, made.page_size), together(made)
    geometry = kvcache.kv_reservation.page_pool.geometry
    assert len(geometry.starts) == LAYERS // each
    assert geometry.stride_bytes == 2 * each * ROW_BYTES * made.page_size
    base = kvcache.k_buffer[0].data_ptr()
    for layer, (k, v) in enumerate(zip(kvcache.k_buffer, kvcache.v_buffer, strict=True)):
        assert k.shape == v.shape == (SLOTS + made.page_size, HEADS, HEAD_DIM)
        assert k.stride() == v.stride() == (2 * each * HEADS * HEAD_DIM, HEAD_DIM, 1)
        assert v.data_ptr() - k.data_ptr() == ROW_BYTES
        buffer, row = divmod(layer, each)
        assert k.data_ptr() - base == geometry.starts[buffer] + 2 * row * ROW_BYTES


def test_stored_keys_and_values_are_read_back_and_nothing_else_is_written(made: Engine) -> None:
    stock, elastic = pair(made)
    same(stock, elastic)
    view = paged_kv_view(elastic.k_buffer[0], made.page_size, HEADS, HEAD_DIM)
    assert torch.equal(view.flatten(0, 1), stock.k_buffer[0])
    assert view.data_ptr() == elastic.k_buffer[0].data_ptr(), "a view, no copy"


def _copy_rows(pointers: Any, strides: Any, target: Any, source: Any, count: int, *_: Any) -> None:
    """Copy rows as SGLang's kernel does: a stride is the distance of two rows and the bytes it copies."""
    rows = list(zip(target[:count].tolist(), source[:count].tolist(), strict=True))
    for base, stride in zip(pointers.tolist(), strides.tolist(), strict=True):
        kept = [ctypes.string_at(base + at * stride, stride) for _, at in rows]
        for (to, _), row in zip(rows, kept, strict=True):
            ctypes.memmove(base + to * stride, row, stride)


@pytest.mark.parametrize("native", [True, False])
def test_moving_slots_moves_keys_and_values(
    made: Engine, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_pool, "copy_all_layer_kv_cache_func", _copy_rows)
    more = {"enable_kv_cache_copy": not native}  # as SGLang asks where there is a draft model
    stock, elastic = pair(made, **more)
    stock.use_native_move_kv_cache = elastic.use_native_move_kv_cache = native
    before = stock.k_buffer[0].clone()
    for kvcache in (stock, elastic):
        kvcache.move_kv_cache(torch.arange(101, 160), torch.arange(1, 60))
    same(stock, elastic)
    assert not torch.equal(stock.k_buffer[0], before)


def test_the_pointers_and_strides_for_moves_cover_whole_rows(
    made: Engine,
) -> None:
    kvcache = mha_pool(ElasticMHATokenToKVPool, SLOTS, made.page_size)
    each = together(made)
    assert kvcache.data_ptrs.tolist() == [buffer.data_ptr() for buffer in kvcache.k_buffer[::each]]
    assert kvcache.data_strides.tolist() == [2 * each * ROW_BYTES] * (LAYERS // each)
    assert all(buffer.is_contiguous() for buffer in kvcache._slot_move_pointer_buffers())


def test_a_copy_to_the_host_and_back_is_unchanged(made: Engine) -> None:
    stock, elastic = pair(made)
    slots = torch.arange(1, 120)
    kept = elastic.get_cpu_copy(slots)
    for buffer in (*elastic.k_buffer, *elastic.v_buffer):
        buffer[slots] = 0.0
    elastic.load_cpu_copy(kept, slots)
    same(stock, elastic)


def test_the_log_names_the_layout(made: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        mha_pool(ElasticMHATokenToKVPool, SLOTS, made.page_size)
    expected = "all layers of a token" if together(made) == LAYERS else "keys and values of a layer"
    assert f"{expected} together" in caplog.text


def test_every_strided_backend_is_one_of_sglangs() -> None:
    assert set(ATTENTION_BACKENDS) >= STRIDED_BACKENDS


@pytest.mark.parametrize("backends", [(name, name) for name in sorted(STRIDED_BACKENDS)])
def test_strided_backends_may_have_any_layout_and_proven_ones_have_block_by_default(
    backends: tuple[str, str],
) -> None:
    for layout in ("block", "layer", "engine"):
        assert chosen(layout, backends, False) == layout
    assert chosen("auto", backends, False) == (DEFAULT if backends[0] in PROVEN_BACKENDS else "engine")


@pytest.mark.parametrize(
    ("backends", "amx", "name"),
    [
        (("trtllm_mha", "trtllm_mha"), False, "trtllm_mha"),
        (("fa4", "fa4"), False, "fa4"),
        (("fa3", "hpc_ops"), False, "hpc_ops"),
        ((None, None), False, "None"),
        (("torch_native", "torch_native"), True, "the AMX kernels"),
    ],
)
def test_other_backends_have_stocks_layout_and_refuse_another_one_by_name(
    backends: tuple[str | None, str | None], amx: bool, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen("auto", backends, amx) == "engine"
    assert name in caplog.text
    for layout in ("block", "layer"):
        with pytest.raises(
            UnsupportedError, match=f"KVCACHED_LAYOUT={layout}: .*{name}.*--attention-backend fa3"
        ):
            chosen(layout, backends, amx)
