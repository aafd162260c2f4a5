"""Estimates of the bytes that a rank will take, made from vLLM's configuration before the rank loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcached_core.startup import estimates, weight_files

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def private_bytes(vllm_config: VllmConfig, on_host: bool) -> int:
    """Return a rank's peak bytes outside its KV cache, without CUDA context and communication buffers."""
    return estimates.private_bytes(lambda: weight_bytes(vllm_config), on_host)


def weight_bytes(vllm_config: VllmConfig) -> int:
    """Return the bytes of one rank's weights: from local weight files if there are any, else from the
    parameter count."""
    model, load, parallel = vllm_config.model_config, vllm_config.load_config, vllm_config.parallel_config
    is_dummy = load.load_format == "dummy"
    folder = None if is_dummy else weight_files.model_folder(model.model, model.revision, load.download_dir)
    total_bytes = weight_files.weight_bytes(model, folder)
    return -(-total_bytes // int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size))


def longest_request_bytes(vllm_config: VllmConfig) -> int:
    """Return the bytes of one request of the maximum length in a rank's KV cache, plus a margin.

    Returns 0 if vLLM has not chosen that length yet.
    """
    model = vllm_config.model_config
    if model.original_max_model_len == -1:
        return 0
    return estimates.longest_request_bytes(model.max_model_len, lambda: _token_bytes(vllm_config))


def _token_bytes(vllm_config: VllmConfig) -> int:
    """Return the KV cache bytes of one token on one rank."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    number_bytes: int = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model).itemsize
    vectors = 1 if model.use_mla else 2  # keys and values
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    return int(layers * heads * model.get_head_size() * vectors * number_bytes)
