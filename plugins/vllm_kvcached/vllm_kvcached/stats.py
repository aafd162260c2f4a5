"""The engine's KV memory in vLLM's own /metrics, through its group of stat-logger plugins.

The API server reads the ledger when it is scraped, so that an idle engine's figures are not old ones. With
several API servers vLLM collects metrics from files, which have no room for this: then use `kvctl export`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from vllm.v1.metrics.loggers import StatLoggerBase

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import OwnerSnapshot, snapshot
from kvcached_core.ledger.tools.metric_definitions import DURATION_METRICS, ENGINE_METRICS
from vllm_kvcached import SCHEDULER
from vllm_kvcached.support import instance, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm:kvcached_"
LABELS = ("model_name", "engine", "UUID", "rank")


class InstanceCollector:
    """Reads the slots of one engine whenever it is asked."""

    def __init__(self, runtime: Runtime, instance_id: str, model_name: str, engine: str) -> None:
        self.instance_id = instance_id
        self._runtime = runtime
        self._labels = (model_name, engine)

    def describe(self) -> list[Metric]:
        """Return nothing: registration reads no ledger."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every rank; none while the ledger cannot be read."""
        owners: list[tuple[str, OwnerSnapshot]] = []
        with contextlib.suppress(KVCachedError):
            owners = [
                (device.uuid, owner)
                for device in snapshot(self._runtime)
                for owner in device.owners
                if owner.live and owner.heard and owner.instance == self.instance_id
            ]
        for metric in ENGINE_METRICS:
            kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
            family = kind(PREFIX + metric.name, metric.help, labels=LABELS)
            for uuid, owner in owners:
                family.add_metric((*self._labels, uuid, str(owner.rank)), float(metric.value(owner)))
            yield family
        for time in DURATION_METRICS:
            histogram = HistogramMetricFamily(PREFIX + time.name, time.help, labels=LABELS)
            for uuid, owner in owners:
                took = time.value(owner)
                histogram.add_metric(
                    (*self._labels, uuid, str(owner.rank)), took.cumulative(), took.sum_seconds
                )
            yield histogram


class KVCachedStats(StatLoggerBase):
    """Registers the collector of an elastic engine; does nothing for a stock one."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
            return
        runtime = Runtime.open(settings(vllm_config).runtime_dir or None, create=False)
        model_name = str(vllm_config.model_config.served_model_name)
        collector = InstanceCollector(runtime, instance(vllm_config), model_name, str(engine_index))
        for there in list(REGISTRY._collector_to_names):
            if isinstance(there, InstanceCollector) and there.instance_id == collector.instance_id:
                REGISTRY.unregister(there)
        REGISTRY.register(collector)

    def record(self, *args: Any, **more: Any) -> None:
        """Do nothing: figures are read when they are asked for."""

    def log_engine_initialized(self) -> None:
        """Do nothing."""
