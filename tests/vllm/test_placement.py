"""The segments computed from vLLM's description of its KV cache tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcached_core.errors import UnsupportedError
from vllm_kvcached.placement import (
    Placement,
    block_step,
    blocks_of_longest_request,
    bytes_per_block,
    placement,
)

BLOCK = 1 << 12


def spec(block_size: int = 16, heads: int = 4, head_size: int = 32) -> FullAttentionSpec:
    """Return vLLM's description of one layer; a block has 2 * 2 * block_size * heads * head_size bytes."""
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=head_size, dtype=torch.float16
    )


def tensor(layers: int, layer_stride: int, block_stride: int, offset: int = 0, host: bool = False) -> Any:
    """Return a tensor of the KV cache as vLLM describes it."""
    return SimpleNamespace(
        layers=[f"layer.{n}" for n in range(layers)], layer_stride=layer_stride, block_stride=block_stride,
        offset=offset, host_resident=host,
    )  # fmt: skip


def cache(*tensors: Any, layout: str = "BLHNC") -> Any:
    """Return a configuration of a KV cache."""
    return SimpleNamespace(kv_cache_layout=layout, kv_cache_tensors=list(tensors))


def test_with_the_block_outermost_there_is_one_segment() -> None:
    found = placement(cache(tensor(32, layer_stride=BLOCK, block_stride=32 * BLOCK)))
    assert found == Placement((0,), 32 * BLOCK)


def test_with_the_layer_outermost_there_is_one_segment_for_each_layer() -> None:
    found = placement(cache(tensor(3, layer_stride=100 * BLOCK, block_stride=BLOCK), layout="LBHNC"))
    assert found == Placement((0, 100 * BLOCK, 200 * BLOCK), BLOCK)


def test_several_tensors_share_segments_or_add_their_own() -> None:
    block_outermost = [tensor(2, BLOCK, 4 * BLOCK, offset=n * 2 * BLOCK) for n in range(2)]
    assert placement(cache(*block_outermost)) == Placement((0,), 4 * BLOCK)
    layers = [tensor(2, 10 * BLOCK, BLOCK, offset=n * 20 * BLOCK) for n in (1, 0)]
    assert placement(cache(*layers)).starts == (0, 10 * BLOCK, 20 * BLOCK, 30 * BLOCK)


def test_a_single_layer_has_one_segment_in_either_order() -> None:
    assert placement(cache(tensor(1, layer_stride=BLOCK, block_stride=BLOCK))) == Placement((0,), BLOCK)


@given(layers=st.integers(1, 40), blocks=st.integers(2, 1000), outermost=st.booleans())
def test_every_byte_of_a_block_is_in_exactly_one_segment(layers: int, blocks: int, outermost: bool) -> None:
    strides = (BLOCK, layers * BLOCK) if outermost else (blocks * BLOCK, BLOCK)
    found = placement(cache(tensor(layers, *strides)))
    assert len(found.starts) * found.stride_bytes == layers * BLOCK
    for layer in (0, layers - 1):
        for block in (0, blocks - 1):
            at = layer * strides[0] + block * strides[1]
            inside = [
                s for s in found.starts if 0 <= at - s - block * found.stride_bytes < found.stride_bytes
            ]
            assert len(inside) == 1


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (cache(tensor(1, BLOCK, BLOCK), layout="LHBNC"), "LHBNC scatters a block over its heads"),
        (cache(tensor(1, BLOCK, BLOCK, host=True)), "host memory"),
        (cache(tensor(2, 9 * BLOCK, BLOCK), tensor(2, 9 * BLOCK, 2 * BLOCK)), r"\[4096, 8192\] bytes"),
        (cache(tensor(2, BLOCK, 2 * BLOCK), tensor(2, 9 * BLOCK, BLOCK)), "blocks of different sizes"),
    ],
)
def test_an_uneven_layout_is_refused(config: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        placement(config)


def test_a_block_has_the_bytes_of_all_layers() -> None:
    assert bytes_per_block({"a": spec(), "b": spec(heads=2)}) == 2 * 2 * 16 * (4 + 2) * 32
    with pytest.raises(UnsupportedError, match="no KV cache"):
        bytes_per_block({})


@given(
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    granularity=st.sampled_from([4096, 2 << 20]),
    times=st.integers(1, 5),
)
def test_any_multiple_of_the_step_begins_each_layer_on_a_page(
    sizes: list[int], granularity: int, times: int
) -> None:
    specs = {str(at): SimpleNamespace(page_size_bytes=size * 1024) for at, size in enumerate(sizes)}
    step = block_step(specs, granularity)
    assert all(times * step * size * 1024 % granularity == 0 for size in sizes)
    smaller = [
        n for n in range(1, min(step, 64)) if all(n * size * 1024 % granularity == 0 for size in sizes)
    ]
    assert smaller == [], "no smaller step would do"


def test_the_longest_request_counts_in_every_group() -> None:
    groups = [SimpleNamespace(kv_cache_spec=spec(16)), SimpleNamespace(kv_cache_spec=spec(32))]
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
    assert blocks_of_longest_request(config, SimpleNamespace(kv_cache_groups=groups)) == 7 + 4
