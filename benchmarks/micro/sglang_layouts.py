"""Compare the answers and the speed of SGLang's Triton kernels over three layouts of a KV cache.

    python -m benchmarks.micro.sglang_layouts --out benchmarks/results/sglang_layouts.json

The cache has the shape of Llama-8B; no engine runs. Layout `stock` has one buffer for the keys of each
layer and one for its values; `layer` holds keys and values of a layer together; `block` holds all layers of
a token in one row. The kernels store, attend to and move token slots, also at the end of 24 GiB, where
offsets in a `block` buffer exceed 32 bits. Then decode attention of all layers is timed with slots in order,
in shuffled pages of 16 slots, and in random order. The exit status is 1 if an answer differs. Needs a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.lib import options as options_of
from benchmarks.lib.record import Ratio, write
from sglang_kvcached import layouts

LAYERS, HEADS, QUERY_HEADS, SIZE = 32, 8, 32, 128
FAR_SLOTS, NEAR_SLOTS = 24 * 2**30 // (LAYERS * 2 * HEADS * SIZE * 2), 4096
SPLITS = 8  # most splits of a request: SGLang's default
SCENES = ((224, 640, 2), (64, 4096, 4), (8, 8192, 8))  # requests, tokens of each, splits of a request
ORDERS, LAYOUTS = ("ordered", "pages", "shuffled"), ("stock", "layer", "block")
WARM_UPS, REPEATS, ROUNDS = 20, 5, 2  # warm-ups, because a device is slow at first after a pause


class Cache(NamedTuple):
    """Views of the keys and the values of each layer, and the buffers whose rows SGLang moves."""

    keys: list[Any]
    values: list[Any]
    rows: list[Any]


def cache(layout: str, slots: int) -> Cache:
    """Return an empty cache of a layout."""
    import torch

    def zeros(*shape: int) -> Any:
        return torch.zeros(*shape, HEADS, SIZE, dtype=torch.bfloat16, device="cuda")

    if layout == "stock":
        buffers = list(zeros(2 * LAYERS, slots))
        return Cache(buffers[0::2], buffers[1::2], buffers)
    lanes, layers = (LAYERS, 1) if layout == "layer" else (1, LAYERS)
    rows = list(zeros(lanes, slots, layers, 2))
    return Cache(*layouts.buffers(rows), rows)


def order(name: str, tokens: int) -> Any:
    """Return the slots of the tokens, one request after the other, in the order called `name`."""
    import torch

    slots = torch.arange(tokens, device="cuda")
    if name == "pages":
        slots = slots.view(-1, 16)[torch.randperm(tokens // 16, device="cuda")].flatten()
    elif name == "shuffled":
        slots = slots[torch.randperm(tokens, device="cuda")]
    return slots


def decoder(found: Cache, slots: Any, requests: int, splits: int) -> Callable[[int], Any]:
    """Return a function of a layer that makes one new token of each request attend to its slots."""
    import torch
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    generator = torch.Generator("cuda").manual_seed(7)
    query = torch.randn(requests, QUERY_HEADS, SIZE, dtype=torch.bfloat16, device="cuda", generator=generator)
    out = torch.empty_like(query)
    ends = torch.arange(requests + 1, dtype=torch.int32, device="cuda") * (len(slots) // requests)
    parts = torch.empty(requests, QUERY_HEADS, SPLITS, SIZE, device="cuda")
    counts = torch.full((requests,), splits, dtype=torch.int32, device="cuda")

    def attend(layer: int) -> Any:
        decode_attention_fwd(
            query, found.keys[layer], found.values[layer], out, ends, slots, parts, parts[..., 0].clone(),
            counts, SPLITS, SIZE**-0.5, 1.0, 1.0,
        )  # fmt: skip
        return out

    return attend


def extended(found: Cache, slots: Any, layer: int) -> Any:
    """Return the attention of 64 new tokens of one request to its slots and to each other."""
    import torch
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    generator = torch.Generator("cuda").manual_seed(9)
    query, new = (
        torch.randn(*shape, SIZE, dtype=torch.bfloat16, device="cuda", generator=generator)
        for shape in ((64, QUERY_HEADS), (2, 64, HEADS))
    )
    out = torch.empty_like(query)
    ends = torch.tensor([0, len(slots)], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    extend_attention_fwd(
        query, new[0], new[1], out, found.keys[layer], found.values[layer], starts, ends, slots, None, True,
        None, 64, 1.0, 1.0, sm_scale=SIZE**-0.5,
    )  # fmt: skip
    return out


def answers(layout: str, slots: int) -> dict[str, Any]:
    """Store, attend to and move the last of `slots` slots; return everything that the kernels read."""
    import torch
    from sglang.kernels.ops.kvcache.cache_move import copy_all_layer_kv_cache_tiled
    from sglang.kernels.ops.kvcache.kvcache import store_cache

    found, width = cache(layout, slots), HEADS * SIZE
    generator = torch.Generator("cuda").manual_seed(3)
    used = slots - 1 - torch.randperm(2048, device="cuda", generator=generator)
    for keys, values in zip(found.keys, found.values, strict=True):
        new = torch.randn(2, len(used), width, dtype=torch.bfloat16, device="cuda", generator=generator)
        store_cache(new[0], new[1], keys.view(-1, width), values.view(-1, width), used, size_limit=slots)
    last = LAYERS - 1
    seen = {"stored": torch.stack([found.keys[last][used], found.values[last][used]])}
    seen["decode"] = decoder(found, used, 4, 2)(last).clone()
    seen["extend"] = extended(found, used, last)
    pointers = torch.tensor([rows.data_ptr() for rows in found.rows], dtype=torch.uint64, device="cuda")
    bytes_each = torch.tensor([rows.stride(0) * 2 for rows in found.rows], device="cuda")
    tiles = -(-int(bytes_each[0]) // 512)
    copy_all_layer_kv_cache_tiled[(len(found.rows), tiles)](
        pointers, bytes_each, used[:64], used[64:128], 64, 64, BYTES_PER_TILE=512
    )
    seen["moved"] = torch.stack([torch.stack([k[used], v[used]]) for k, v in zip(*found[:2], strict=True)])
    return seen


def milliseconds(layout: str, requests: int, tokens: int, splits: int) -> dict[str, list[float]]:
    """Return the times of decode attention over all layers, by the order of the slots."""
    import torch

    found, taken = cache(layout, requests * tokens), dict[str, list[float]]()
    for name in ORDERS:
        attend = decoder(found, order(name, requests * tokens), requests, splits)
        attend(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(LAYERS):
                attend(layer)
        for _ in range(WARM_UPS):
            graph.replay()
        for _ in range(REPEATS):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            taken.setdefault(name, []).append(begun.elapsed_time(ended))
    return taken


def main() -> int:
    """Compare the answers, time the kernels, write the JSON and print the outcome."""
    parser = options_of.parser("micro.sglang_layouts", __doc__)
    options, started = parser.parse_args(), time.time()
    import torch

    if not torch.cuda.is_available():
        parser.error("a GPU is needed: on the CPU, tests/sglang/triton_kernels.py compares answers")
    expected = answers("stock", NEAR_SLOTS)
    same = {
        f"{name}, {layout}, {slots} slots": bool(torch.equal(expected[name], value))
        for layout, slots in (("layer", NEAR_SLOTS), ("block", NEAR_SLOTS), ("block", FAR_SLOTS))
        for name, value in answers(layout, slots).items()
    }
    samples: dict[str, list[float]] = {}
    ratios: dict[str, Ratio] = {}
    for requests, tokens, splits in SCENES:
        for _ in range(ROUNDS):
            for layout in LAYOUTS:
                for name, taken in milliseconds(layout, requests, tokens, splits).items():
                    samples.setdefault(f"{requests}x{tokens}_{name}_{layout}_ms", []).extend(taken)
                torch.cuda.empty_cache()
        for name in ORDERS:
            scene = f"{requests}x{tokens}_{name}"
            for layout in LAYOUTS[1:]:
                ratios[f"{scene}_{layout}"] = Ratio(f"{scene}_{layout}_ms", f"{scene}_stock_ms")
    write(options.out, sys.argv, samples, ratios, started, {"same": same})
    print(options.out.read_text()[-4000:])
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
