"""vLLM's schedulers without an engine: a model that exists only as a configuration, and made-up tokens."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from devkit.models import TINY
from vllm_kvcached import SCHEDULER, WORKER

BLOCK_TOKENS = 16
_numbers = itertools.count()


@cache
def _none_hash() -> None:
    init_none_hash(sha256)


def vllm_config(folder: Path, **arguments: Any) -> Any:
    """Return vLLM's configuration for the command line of a tiny Llama without weights."""
    described = {
        **TINY,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(described))
    options = {
        "skip_tokenizer_init": True, "max_model_len": 512, "block_size": BLOCK_TOKENS, "max_num_seqs": 8,
        "max_num_batched_tokens": 64, "async_scheduling": False, "dtype": "float32",
        "worker_cls": WORKER, "scheduler_cls": SCHEDULER,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own warnings
        return EngineArgs(model=str(folder), **{**options, **arguments}).create_engine_config()


def scheduler(kind: Any, config: Any, blocks: int) -> Any:
    """Return a scheduler of this class with this many blocks and one group of layers."""
    _none_hash()
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=4, head_size=32, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = blocks
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        log_stats=True,
    )


def request(prompt: Sequence[int] | int, answer: int, client: int = 0) -> Any:
    """Return a request with these prompt tokens, or this many unique ones, and this many output tokens."""
    number = next(_numbers)
    tokens = [number * 7 % 500, *range(prompt - 1)] if isinstance(prompt, int) else list(prompt)
    return Request(
        f"request-{number}", tokens, SamplingParams(max_tokens=answer, ignore_eos=True), None,
        client_index=client, block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )  # fmt: skip


def finish_step(of: Any, output: Any) -> Any:
    """Answer a step like a model that always generates token 5; return the outputs for the clients."""
    names = list(output.num_scheduled_tokens)
    done = {name: of.requests[name].num_computed_tokens >= of.requests[name].num_tokens for name in names}
    return of.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[5] if done[name] else [] for name in names],
        ),
    )
