"""Estimates, before an engine loads, of the memory that each rank will take; in bytes."""

from __future__ import annotations

import logging
import math
from typing import Any

from kvcached_core.startup import weight_files
from kvcached_core.startup.weight_files import estimated, model_folder
from kvcached_core.units import GIB, format_size

_log = logging.getLogger(__name__)

# Beside weights and CUDA context. An 8B model on an H100 took about 1.2 GiB for the activations of the
# largest step and 0.6 GiB for CUDA graphs.
DEVICE_BYTES = 2 * GIB
HOST_BYTES = GIB  # activations and the allocator of a process that has imported everything
_MARGIN = 1.1


def private_bytes(model: Any, load_format: str, ranks: int, on_host: bool) -> int:
    """Return the peak memory of a rank outside its KV cache, without its CUDA context and communication.

    `model` is SGLang's ModelConfig; `ranks` is the number of ranks that share the weights.
    """
    total_bytes = estimated("the size of the weights", lambda: weight_bytes(model, load_format))
    weights = -(-total_bytes // ranks)
    _log.info("kvcached: the weights are estimated at %s on each rank", format_size(weights))
    return weights + (HOST_BYTES if on_host else DEVICE_BYTES)


def weight_bytes(model: Any, load_format: str) -> int:
    """Return the bytes of a model's weights: the size of local files, else computed from the parameters."""
    folder = None if load_format == "dummy" else model_folder(model.model_path, model.revision)
    return weight_files.weight_bytes(model, folder)


def longest_request_bytes(model: Any, tensor_parallel: int, number_bytes: int) -> int:
    """Return the KV cache of one request of the maximum length on a rank, with a margin of 10 %.

    `number_bytes` is the size of a number in the cache. An upper bound if layers have a sliding window.
    """
    return estimated("the floor", lambda: _full_attention_bytes(model, tensor_parallel, number_bytes))


def _full_attention_bytes(model: Any, tensor_parallel: int, number_bytes: int) -> int:
    if getattr(model, "kv_lora_rank", None):
        numbers = int(model.kv_lora_rank) + int(model.qk_rope_head_dim)
    else:
        numbers = model.get_num_kv_heads(tensor_parallel) * (model.head_dim + model.v_head_dim)
    layers = int(model.hf_text_config.num_hidden_layers)
    return math.ceil(_MARGIN * int(model.context_len) * layers * numbers * number_bytes)
