"""Estimates of the bytes that a rank will take, made from SGLang's ModelConfig before the rank loads."""

from __future__ import annotations

from typing import Any

from kvcached_core.startup import estimates, weight_files


def private_bytes(model: Any, load_format: str, ranks: int, on_host: bool) -> int:
    """Return a rank's peak bytes outside its KV cache, without CUDA context and communication buffers.

    `model` is SGLang's ModelConfig; `ranks` ranks share its weights evenly.
    """
    return estimates.private_bytes(lambda: -(-weight_bytes(model, load_format) // ranks), on_host)


def weight_bytes(model: Any, load_format: str) -> int:
    """Return the bytes of a model's weights: from local weight files, else from the parameter count."""
    is_dummy = load_format == "dummy"
    folder = None if is_dummy else weight_files.model_folder(model.model_path, model.revision)
    return weight_files.weight_bytes(model, folder)


def longest_request_bytes(model: Any, tensor_parallel: int, number_bytes: int) -> int:
    """Return the bytes of one request of the maximum length in a rank's KV cache, plus a margin.

    `number_bytes` is the size of a number in the cache.
    """
    return estimates.longest_request_bytes(
        int(model.context_len), lambda: _token_bytes(model, tensor_parallel, number_bytes)
    )


def _token_bytes(model: Any, tensor_parallel: int, number_bytes: int) -> int:
    """Return the KV cache bytes of one token on one rank."""
    if getattr(model, "kv_lora_rank", None):
        numbers = int(model.kv_lora_rank) + int(model.qk_rope_head_dim)
    else:
        numbers = model.get_num_kv_heads(tensor_parallel) * (model.head_dim + model.v_head_dim)
    return int(model.hf_text_config.num_hidden_layers) * int(numbers) * number_bytes
