"""The settings of an engine, and the vLLM options that this plugin refuses or has not been tested with."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from vllm import envs

from kvcached_core import config
from kvcached_core.config import Config
from kvcached_core.errors import ConfigError, UnsupportedError
from vllm_kvcached.names import RUN_VARIABLE, SCHEDULER, WORKER

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)


def settings(vllm_config: VllmConfig) -> Config:
    """Return the settings of an engine, from --additional-config '{"kvcached": {...}}' and KVCACHED_*."""
    return settings_in(vllm_config.additional_config)


def settings_in(additional: object) -> Config:
    """Return the settings from the value of `--additional-config` and KVCACHED_*. Raises ConfigError."""
    options = additional.get("kvcached", {}) if isinstance(additional, dict) else {}
    if not isinstance(options, dict):
        raise ConfigError(f"--additional-config kvcached={options!r}: expected an object of settings")
    return config.load(options, os.environ)


def instance(vllm_config: VllmConfig) -> str:
    """Return the name by which scheduler and workers of one engine find each other in the ledger."""
    return f"{os.environ.get(RUN_VARIABLE, '')}-{vllm_config.instance_id}"


def adopt_logging() -> None:
    """Send this project's log lines to vLLM's handlers."""
    engine = logging.getLogger("vllm")
    for name in ("kvcached_core", "vllm_kvcached"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = engine.handlers, engine.propagate
        logger.setLevel(engine.level)


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedError for options that this plugin cannot work with; warn of untested ones."""
    adopt_logging()
    reasons = _refusals(vllm_config)
    if reasons:
        raise UnsupportedError(f"--kv-cache-backend kvcached: {'; '.join(reasons)}")
    for untried in _untried(vllm_config):
        _log.warning("kvcached has not been tested with %s; please report what you see", untried)


def _refusals(vllm_config: VllmConfig) -> list[str]:
    """Return the reason, with a remedy, for each option that cannot be used."""
    checks = {**_cache_checks(vllm_config), **_parallel_checks(vllm_config)}
    return [reason for reason, applies in checks.items() if applies]


def _cache_checks(vllm_config: VllmConfig) -> dict[str, bool]:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    sleeper = getattr(vllm_config.model_config, "sleep_mode_backend", "cumem")
    return {
        "layout 'layer' is one of SGLang's pools: set KVCACHED_LAYOUT to auto, block or engine": (
            settings(vllm_config).layout == "layer"
        ),
        f"worker class {parallel.worker_cls} cannot hold an elastic cache: leave out --worker-cls": (
            parallel.worker_cls != WORKER
        ),
        f"scheduler class {scheduler_cls} does not plan elastic memory: leave out --scheduler-cls": (
            scheduler_cls != SCHEDULER
        ),
        "KV connectors may read blocks that were freed: leave out --kv-transfer-config": (
            vllm_config.kv_transfer_config is not None
        ),
        "encoder connectors are not supported: leave out --ec-transfer-config": (
            getattr(vllm_config, "ec_transfer_config", None) is not None
        ),
        "num_gpu_blocks_override contradicts a cache that grows and shrinks: set the limit instead": (
            cache.num_gpu_blocks_override is not None
        ),
        f"sleep mode by {sleeper!r} also takes the memory of our KV cache: set sleep_mode_backend to cumem": (
            sleeper != "cumem"
        ),
        "a stored start-up plan fixes the size of the cache: unset VLLM_ENABLE_STARTUP_PLAN": (
            bool(getattr(envs, "VLLM_ENABLE_STARTUP_PLAN", False))
        ),
    }


def _parallel_checks(vllm_config: VllmConfig) -> dict[str, bool]:
    parallel = vllm_config.parallel_config
    backend = parallel.distributed_executor_backend
    return {
        f"executor {backend!r} is not supported: use --distributed-executor-backend mp": (
            backend not in (None, "mp", "uni")
        ),
        "elastic expert parallelism is not supported: leave out --enable-elastic-ep": (
            bool(getattr(parallel, "enable_elastic_ep", False))
        ),
        "micro-batches run on a second stream: leave out --enable-dbo": (
            bool(getattr(parallel, "enable_dbo", False))
        ),
        "data parallelism over several nodes is not supported: start an engine for each replica": (
            parallel.nnodes > 1 and parallel.data_parallel_size > 1
        ),
    }


def _untried(vllm_config: VllmConfig) -> list[str]:
    parallel = vllm_config.parallel_config
    checks = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "data parallelism": parallel.data_parallel_size > 1,
        "LoRA": vllm_config.lora_config is not None,
        "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "encoder-decoder models": bool(getattr(vllm_config.model_config, "is_encoder_decoder", False)),
    }
    return [feature for feature, applies in checks.items() if applies]
