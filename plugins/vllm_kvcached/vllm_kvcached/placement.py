"""Where vLLM puts its blocks: segments, strides and sizes for the core's geometry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvcached_core.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


class Placement(NamedTuple):
    """Block b of segment s occupies `stride_bytes` from byte `starts[s]` + b * `stride_bytes`."""

    starts: tuple[int, ...]
    stride_bytes: int


def placement(kv_cache_config: KVCacheConfig) -> Placement:
    """Return the segments of a KV cache: one if the block is the outermost dimension, else one per layer.

    Raises UnsupportedError for a cache whose blocks are not laid out evenly.
    """
    if kv_cache_config.kv_cache_layout == "LHBNC":
        raise UnsupportedError(
            "the KV cache layout LHBNC scatters a block over its heads: choose another layout"
        )
    segments: set[tuple[int, int]] = set()
    for tensor in kv_cache_config.kv_cache_tensors:
        if tensor.host_resident:
            raise UnsupportedError(
                "KV cache tensors in host memory beside the device (HiSparse) are not supported"
            )
        if tensor.layer_stride <= tensor.block_stride:
            segments.add((0, tensor.block_stride))
        else:
            starts = (tensor.offset + layer * tensor.layer_stride for layer in range(len(tensor.layers)))
            segments.update((start, tensor.block_stride) for start in starts)
    strides = {stride for _, stride in segments}
    if len(strides) != 1:
        raise UnsupportedError(
            f"the layers of this model have blocks of different sizes ({sorted(strides)} bytes), "
            f"which the elastic KV cache does not support yet: start without --kv-cache-backend kvcached"
        )
    return Placement(tuple(sorted(start for start, _ in segments)), strides.pop())


def bytes_per_block(specs: dict[str, KVCacheSpec]) -> int:
    """Return the bytes of one block in all layers of a worker; UnsupportedError if there is no KV cache."""
    total: int = sum(spec.page_size_bytes for spec in specs.values())
    if not total:
        raise UnsupportedError("this model has no KV cache: start without --kv-cache-backend kvcached")
    return total


def block_step(specs: dict[str, KVCacheSpec], granularity_bytes: int) -> int:
    """Return n: with a multiple of n blocks, the blocks of every layer begin on a whole physical page."""
    pages = {spec.page_size_bytes for spec in specs.values()}
    return math.lcm(*(granularity_bytes // math.gcd(granularity_bytes, page) for page in pages))


def blocks_of_longest_request(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Return an upper bound of the blocks that one request of the maximum length needs in all groups."""
    length = vllm_config.model_config.max_model_len
    return sum(-(-length // group.kv_cache_spec.block_size) for group in kv_cache_config.kv_cache_groups)
