"""Answer the prompts of benchmarks.engine.outputs with SGLang.

SGLang cannot draw random weights in place. So the first run writes a checkpoint with an eighth of the layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.engine.outputs import Answer, rounds_of_prompts, settings
from benchmarks.lib import sglang_engine, vllm_engine

TOKENS, LAYERS = 64, 4


def generate(options: argparse.Namespace) -> list[Answer]:
    """Run one engine over all rounds."""
    model = checkpoint(options.model.with_name("llama-8-layers"), options.deviation)
    engine = sglang_engine.engine(
        options.backend, model, int(options.kv_gib * 2**30) * LAYERS // 32, settings(options),
        options.requests, token_bytes=sglang_engine.BYTES_PER_TOKEN * LAYERS // 32,
        ranks=options.tensor_parallel,
    )  # fmt: skip
    try:
        return [
            _choices(answer)
            for prompts in rounds_of_prompts(options)
            for answer in sglang_engine.generate(
                engine, prompts, TOKENS, return_logprob=True, top_logprobs_num=2
            )
        ]
    finally:
        engine.shutdown()


def _choices(answer: dict[str, Any]) -> Answer:
    """Return each token, and its lead over the second best candidate in log probability."""
    best = [
        sorted((top[0] for top in tops), reverse=True) for tops in answer["meta_info"]["output_top_logprobs"]
    ]
    pairs = zip(answer["output_ids"], best, strict=True)
    return [(int(token), float(first - second)) for token, (first, second, *_) in pairs]


def checkpoint(folder: Path, deviation: float, layers: int = LAYERS) -> Path:
    """Write a model folder with random weights, always the same, unless it exists."""
    done = folder / "model.safetensors.index.json"
    if done.exists():
        return folder
    import torch
    from safetensors.torch import save_file

    shape = vllm_engine.SHAPE | {"num_hidden_layers": layers}
    vllm_engine.model_folder(folder, num_hidden_layers=layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(7)
    names: dict[str, str] = {}
    for part, shapes in enumerate(_parts(shape)):
        tensors = {}
        for name, size in shapes.items():
            tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
            if len(size) > 1:
                tensor.normal_(0.0, deviation, generator=generator)
            tensors[name] = tensor.cpu()
        file = f"model-{part:05}.safetensors"
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    done.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _parts(shape: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = (
        int(shape[name]) for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads = int(shape["num_attention_heads"]) * int(shape["head_dim"])
    kv_heads = int(shape["num_key_value_heads"]) * int(shape["head_dim"])
    layers: list[dict[str, tuple[int, ...]]] = []
    for number in range(int(shape["num_hidden_layers"])):
        sizes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        layers.append({f"model.layers.{number}.{name}.weight": size for name, size in sizes.items()})
    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }  # fmt: skip
    return [*layers, outer]
