"""What an engine will take of its device, estimated before it loads; on one rank, in bytes."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from kvcached_core.startup import weight_files
from kvcached_core.startup.weight_files import estimated, model_folder
from kvcached_core.units import GIB, format_size

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)

# Beside the weights and the CUDA context: of an 8B model on an H100, about 1.2 GiB activations of the largest
# step and 0.6 GiB CUDA graphs.
DEVICE_BYTES = 2 * GIB
HOST_BYTES = GIB  # activations, compiled code and the allocator of a process that has imported everything
_MARGIN = 1.1


def private_bytes(vllm_config: VllmConfig, on_host: bool) -> int:
    """Return what a rank takes outside its KV cache at its peak, less its context and communication."""
    weights = estimated("the size of the weights", lambda: weight_bytes(vllm_config))
    _log.info("kvcached: the weights are estimated at %s on each rank", format_size(weights))
    return weights + (HOST_BYTES if on_host else DEVICE_BYTES)


def weight_bytes(vllm_config: VllmConfig) -> int:
    """Return the bytes of the weights on one rank: of the files if they are here, else of the parameters."""
    model, load, parallel = vllm_config.model_config, vllm_config.load_config, vllm_config.parallel_config
    dummy = load.load_format == "dummy"
    folder = None if dummy else model_folder(model.model, model.revision, load.download_dir)
    total = weight_files.weight_bytes(model, folder)
    return -(-total // int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size))


def longest_request_bytes(vllm_config: VllmConfig) -> int:
    """Return what one request of the maximum length takes of a rank's KV cache, rounded up generously.

    An upper bound where layers see a window only; 0 where the length is yet to be chosen.
    """
    if vllm_config.model_config.original_max_model_len == -1:
        return 0
    return estimated("the floor", lambda: _full_attention_bytes(vllm_config))


def _full_attention_bytes(vllm_config: VllmConfig) -> int:
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    number_bytes: int = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model).itemsize
    vectors = 1 if model.use_mla else 2  # keys and values
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    per_token: int = layers * heads * model.get_head_size() * vectors * number_bytes
    length: int = model.max_model_len
    return math.ceil(_MARGIN * length * per_token)
