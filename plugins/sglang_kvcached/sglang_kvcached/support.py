"""Options, models and platforms that kvcached refuses, with the remedy, and features it warns about."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from kvcached_core import config
from kvcached_core.config import Config
from kvcached_core.errors import ConfigError, UnsupportedError
from sglang_kvcached.process_state import RUN_VARIABLE

_log = logging.getLogger(__name__)

# Switches of SGLang that must be off, by field of ServerArgs, with the reason and the remedy.
_SWITCHES = {
    "enable_memory_saver": "the memory saver frees the KV cache as a whole: leave out --enable-memory-saver",
    "enable_unified_memory": "the unified memory pool is not supported: leave out --enable-unified-memory",
    "enable_hisparse": "HiSparse manages KV memory itself: leave out --enable-hisparse",
    "enable_kv_cache_sharding": "a sharded KV cache is not supported: leave out --enable-kv-cache-sharding",
    "enable_page_major_kv_layout": "the page-major layout is not supported: leave out "
    "--enable-page-major-kv-layout",
    "enable_hierarchical_cache": "HiCache copies KV pages on its own CUDA streams: leave out "
    "--enable-hierarchical-cache",
    "enable_lmcache": "LMCache may read pages after they are unmapped: leave out --enable-lmcache",
    "enable_flexkv": "FlexKV may read pages after they are unmapped: leave out --enable-flexkv",
    "enable_unified_cache_external_linker": "an external linker may read pages after they are "
    "unmapped: leave out --enable-unified-cache-external-linker",
    "enable_pdmux": "prefill and decode on two streams are not supported: leave out --enable-pdmux",
    "enable_two_batch_overlap": "micro-batches run on a second stream: leave out --enable-two-batch-overlap",
    "prefill_only_disable_kv_cache": "without a KV cache there is nothing to make elastic: leave out "
    "--prefill-only-disable-kv-cache",
    "use_ray": "Ray's workers do not inherit the choice: leave out --use-ray",
}
_VARIABLES = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "sizes the KV cache a second time",
    "SGLANG_USE_HND_KVCACHE": "changes the layout of the KV cache",
}
_QUANTIZED = ("fp4", "mxfp8", "int4")
_ON = frozenset({"1", "true", "yes", "on", "y"})


def settings() -> Config:
    """Return this engine's settings from KVCACHED_* variables. Raises ConfigError for an illegal one."""
    chosen = config.load({}, os.environ)
    if chosen.cache_seconds:
        raise ConfigError(
            "kvcached: SGLang's prefix cache has no age limit: unset KVCACHED_CACHE_SECONDS for this engine"
        )
    return chosen


def instance(port_args: Any) -> str:
    """Return the name by which the ranks of one engine find each other in the ledger."""
    return f"{os.environ.get(RUN_VARIABLE, '')}-{port_args.instance_id or port_args.nccl_port}"


def adopt_logging() -> None:
    """Give this project's loggers the level of the root logger, whose handlers SGLang uses."""
    for name in ("kvcached_core", "sglang_kvcached"):
        logging.getLogger(name).setLevel(logging.getLogger().level)


def unresolved_options(server_args: Any) -> dict[str, Any]:
    """Return the arguments of a command line by field, before SGLang resolves them."""
    return {name: getattr(server_args, name) for name in server_args.__struct_fields__}


def refuse(options: Mapping[str, Any]) -> None:
    """Raise UnsupportedError, with every reason, for options that cannot be combined with this backend."""
    reasons = [reason for name, reason in _SWITCHES.items() if options.get(name)]
    reasons += [
        f"{name} {effect}: unset it" for name, effect in _VARIABLES.items()
        if os.environ.get(name, "").lower() in _ON
    ]  # fmt: skip
    mode = options.get("disaggregation_mode", "null")
    dtype = str(options.get("kv_cache_dtype", "auto"))
    checks = {
        f"disaggregated serving is not supported: leave out --disaggregation-mode {mode}": mode != "null",
        f"the quantized KV cache {dtype} is not supported: use --kv-cache-dtype auto, bfloat16 or fp8": (
            dtype.startswith(_QUANTIZED)
        ),
        "pipeline parallelism is not supported yet: leave out --pp-size": options.get("pp_size", 1) > 1,
        "decode context parallelism is not supported yet: leave out --dcp-size": (
            options.get("dcp_size", 1) > 1
        ),
        "several nodes are not supported yet: leave out --nnodes": options.get("nnodes", 1) > 1,
        "elastic expert parallelism is not supported: leave out --elastic-ep-backend": (
            options.get("elastic_ep_backend") is not None
        ),
    }
    reasons += [reason for reason, applies in checks.items() if applies]
    if reasons:
        raise UnsupportedError(f"--kv-cache-backend kvcached: {'; '.join(reasons)}")


def warn_of_untested(options: Mapping[str, Any]) -> None:
    """Log a warning for each feature that has not been tested with this backend."""
    checks = {
        "speculative decoding": options.get("speculative_algorithm") is not None,
        "data parallelism": options.get("dp_size", 1) > 1,
        "LoRA": bool(options.get("enable_lora")),
        "prefill context parallelism": options.get("attn_cp_size", 1) > 1,
    }
    for feature, applies in checks.items():
        if applies:
            _log.warning("kvcached has not been tested with %s; please report what you see", feature)


def refuse_model(configurator: Any) -> None:
    """Raise UnsupportedError, with the name, for a model whose kind of KV cache is not supported."""
    from sglang.srt.configs.model_config import (
        is_deepseek_dsa,
        is_deepseek_v4,
        is_minimax_sparse,
    )
    from sglang.srt.layers.attention.qsa.config import parse_qsa_profile
    from sglang.srt.runtime_context import attention_backends

    model = configurator.model_config.hf_config
    kinds: dict[str, Callable[[Any], Any]] = {
        "DeepSeek sparse attention": is_deepseek_dsa,
        "DeepSeek-V4": is_deepseek_v4,
        "MiniMax sparse attention": is_minimax_sparse,
        "Qwen sparse attention": parse_qsa_profile,
    }
    for name, is_kind in kinds.items():
        if is_kind(model):
            raise UnsupportedError(
                f"--kv-cache-backend kvcached: the KV cache of {name} is not supported yet "
                f"({', '.join(model.architectures or ())}): use --kv-cache-backend default"
            )
    if configurator.is_hybrid_swa and "torch_native" in attention_backends():
        # It reads the sliding window's pool at slot numbers of the full-attention pool.
        raise UnsupportedError(
            "--kv-cache-backend kvcached: SGLang's attention backend torch_native reads wrong slots of a "
            "sliding window's own pool: add --disable-hybrid-swa-memory, or choose another "
            "--attention-backend"
        )
    if str(configurator.kv_cache_dtype_str).startswith(_QUANTIZED):
        raise UnsupportedError(
            f"--kv-cache-backend kvcached: the quantized KV cache {configurator.kv_cache_dtype_str} is not "
            "supported: use --kv-cache-dtype auto, bfloat16 or fp8"
        )


def refuse_platform(supplied: type | None, what: str) -> None:
    """Raise UnsupportedError if the platform supplies a class of its own for `what`."""
    if supplied is not None:
        raise UnsupportedError(
            f"--kv-cache-backend kvcached: this platform has a {what} of its own ({supplied.__module__}."
            f"{supplied.__qualname__}), which cannot be elastic: use --kv-cache-backend default"
        )
