"""Show the engine's KV memory in vLLM's own /metrics, through vLLM's stat-logger plugins.

The API server reads the ledger at each scrape, so the metrics are current even if the engine is idle. With
several API servers vLLM collects metrics through files, which cannot hold these metrics: use `kvctl export`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from vllm.v1.metrics.loggers import StatLoggerBase

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import OwnerSnapshot, snapshot
from kvcached_core.ledger.tools.metric_families import live_ranks, rank_families
from vllm_kvcached.names import SCHEDULER
from vllm_kvcached.support import instance, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:kvcached_"
LABELS = ("model_name", "engine", "UUID", "rank")


class InstanceCollector:
    """Reads the slots of one engine at each scrape and does nothing between two scrapes."""

    def __init__(self, runtime: Runtime, instance_id: str, model_name: str, engine: str) -> None:
        self.instance_id = instance_id
        self._runtime = runtime
        self._labels = (model_name, engine)

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering the collector reads no ledger."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every rank; the families are empty while the ledger cannot be read."""
        ranks: dict[tuple[str, ...], OwnerSnapshot] = {}
        with contextlib.suppress(KVCachedError):
            ranks = {
                (*self._labels, device.uuid, str(owner.rank)): owner
                for device in snapshot(self._runtime)
                for owner in live_ranks(device)
                if owner.instance == self.instance_id
            }
        return rank_families(PREFIX, LABELS, ranks)


class KVCachedStats(StatLoggerBase):
    """Registers the collector for an elastic engine and does nothing for a stock engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
            return
        runtime = Runtime.open(settings(vllm_config).runtime_dir or None, create=False)
        model_name = str(vllm_config.model_config.served_model_name)
        collector = InstanceCollector(runtime, instance(vllm_config), model_name, str(engine_index))
        for registered in list(REGISTRY._collector_to_names):
            if isinstance(registered, InstanceCollector) and registered.instance_id == collector.instance_id:
                REGISTRY.unregister(registered)
        REGISTRY.register(collector)

    def record(self, *args: Any, **more: Any) -> None:
        """Do nothing: the collector reads metrics at each scrape."""

    def log_engine_initialized(self) -> None:
        """Do nothing."""
