"""SGLang's Triton kernels in Triton's interpreter: over a stock pool, and with keys and values together.

`TRITON_INTERPRET=1 python -m tests.sglang.triton_kernels FOLDER` prints, as JSON, which results are the same.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PAGE, SLOTS = 16, 240
LENGTHS, NEW = (20, 37), (5, 9)  # tokens of two requests: in the cache, and new


def filled(kvcache: Any, shape: tuple[int, int]) -> Any:
    """Store keys and values in every slot except those of page 0."""
    generator = torch.Generator().manual_seed(3)
    slots = torch.arange(PAGE, SLOTS + PAGE)
    for layer in range(kvcache.layer_num):
        k, v = torch.randn(2, len(slots), *shape, generator=generator)
        kvcache.set_kv_buffer(SimpleNamespace(layer_id=layer), slots, k, v)
    return kvcache


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the start of each request's slots, and all slots, whose pages lie far apart."""
    order = torch.randperm(SLOTS // PAGE, generator=torch.Generator().manual_seed(5)) + 1
    slots = (order[:, None] * PAGE + torch.arange(PAGE)).flatten()
    begin = -(-LENGTHS[0] // PAGE) * PAGE
    ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    return ends, torch.cat([slots[: LENGTHS[0]], slots[begin : begin + LENGTHS[1]]])


def decode(kvcache: Any, page_size: int) -> torch.Tensor:
    """Let each request attend to its tokens in the cache."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    k, v = kvcache.get_kv_buffer(0)
    query = torch.randn(len(LENGTHS), 2 * k.shape[1], k.shape[2], generator=torch.Generator().manual_seed(7))
    out, splits = torch.zeros_like(query), 2
    parts = torch.zeros(*query.shape[:2], splits, query.shape[2])
    decode_attention_fwd(
        query, k, v, out, *tables(), parts, torch.zeros(parts.shape[:3]),
        torch.full((len(LENGTHS),), splits, dtype=torch.int32), splits, 0.25, 1.0, 1.0, page_size=page_size,
    )  # fmt: skip
    return out


def extend(kvcache: Any, page_size: int) -> torch.Tensor:
    """Let new tokens attend to the tokens in the cache, and to each other."""
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    k, v = kvcache.get_kv_buffer(0)
    generator, (heads, size) = torch.Generator().manual_seed(9), k.shape[1:]
    query = torch.randn(sum(NEW), 2 * heads, size, generator=generator)
    new_k, new_v = torch.randn(2, sum(NEW), heads, size, generator=generator)
    out = torch.zeros_like(query)
    starts = torch.tensor([0, NEW[0], sum(NEW)], dtype=torch.int32)
    extend_attention_fwd(
        query, new_k, new_v, out, k, v, starts, *tables(), None, True, None, max(NEW), 1.0, 1.0,
        sm_scale=0.25, page_size=page_size,
    )  # fmt: skip
    return out


def move(kvcache: Any, page_size: int) -> torch.Tensor:
    """Move slots, as speculative decoding does, and return the whole cache."""
    from sglang.kernels.ops.kvcache.cache_move import copy_all_layer_kv_cache_tiled

    source, target = torch.arange(20, 30), torch.arange(120, 130)
    width = int(kvcache.data_strides[0])
    copy_all_layer_kv_cache_tiled[(len(kvcache.data_ptrs), -(-width // 128))](
        kvcache.data_ptrs, kvcache.data_strides, target, source, len(source), 16, BYTES_PER_TILE=128
    )
    return contents(kvcache)


def contents(kvcache: Any) -> torch.Tensor:
    """Return a copy of all keys and values."""
    return torch.stack([torch.stack(kvcache.get_kv_buffer(layer)) for layer in range(kvcache.layer_num)])


def main(folder: Path) -> None:
    """Run each kernel over a stock pool and over either layout."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from sglang_kvcached.pools import ElasticMHATokenToKVPool
    from tests.sglang.elastic import HEAD_DIM, HEADS, engine, mha_pool

    same: dict[str, bool] = {}
    for layout in ("layer", "block"):
        with engine(folder / layout, PAGE) as made:
            made.context.lay(layout, None)
            classes = (MHATokenToKVPool, ElasticMHATokenToKVPool)
            stock, elastic = (filled(mha_pool(cls, SLOTS, PAGE), (HEADS, HEAD_DIM)) for cls in classes)
            before = contents(stock)
            same[f"{layout}: move"] = torch.equal(move(stock, PAGE), move(elastic, PAGE))
            assert not torch.equal(before, contents(stock))
            for name, kernel in (("decode", decode), ("extend", extend)):
                for page_size in (1, PAGE):
                    found = [kernel(kvcache, page_size) for kvcache in (stock, elastic)]
                    assert float(found[0].abs().min()) > 0.0
                    same[f"{layout}: {name} {page_size}"] = torch.equal(*found)
    print(json.dumps(same))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
