"""What Prometheus is told: the figures of the ledgers, read when it asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvcached_core.ledger.tools.metric_definitions import DEVICE_METRICS, DURATION_METRICS, ENGINE_METRICS
from kvctl.codes import Failure
from kvctl.devices import choose_devices

DEVICE_LABELS = ("gpu", "UUID")
ENGINE_LABELS = (*DEVICE_LABELS, "engine", "model", "name", "rank")
READABLE = "kvcached_ledger_readable"
PREFIX = "kvcached_"


class LedgerCollector:
    """Reads the ledgers whenever Prometheus asks; between two scrapes it does nothing."""

    def __init__(self, runtime: Runtime, device: str | None = None) -> None:
        self._runtime, self._device = runtime, device

    def describe(self) -> list[Metric]:
        """Return nothing: registration reads no ledger."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every family; if the ledgers cannot be read, only that."""
        try:
            all_devices = snapshot(self._runtime)
            chosen = {each.folder for each in choose_devices(all_devices, self._device)}
        except (KVCachedError, Failure):
            yield GaugeMetricFamily(READABLE, _READABLE_HELP, value=0)
            return
        yield GaugeMetricFamily(READABLE, _READABLE_HELP, value=1)
        devices = {place: each for place, each in enumerate(all_devices) if each.folder in chosen}
        yield from _device_families(devices)
        yield from _engine_families(_living(devices))


_READABLE_HELP = "1 if the ledgers can be read."


def _device_families(devices: Mapping[int, DeviceSnapshot]) -> Iterator[Metric]:
    for metric in DEVICE_METRICS:
        family = GaugeMetricFamily(PREFIX + metric.name, metric.help, labels=DEVICE_LABELS)
        for place, device in devices.items():
            family.add_metric([str(place), device.uuid], float(metric.value(device)))
        yield family


def _living(devices: Mapping[int, DeviceSnapshot]) -> dict[tuple[str, ...], OwnerSnapshot]:
    """Return the living ranks by their labels; the dead may have the name of one that lives."""
    return {
        (str(place), device.uuid, owner.engine, owner.model, owner.name, str(owner.rank)): owner
        for place, device in devices.items()
        for owner in device.owners
        if owner.live and owner.heard
    }


def _engine_families(owners: Mapping[tuple[str, ...], OwnerSnapshot]) -> Iterator[Metric]:
    for metric in ENGINE_METRICS:
        kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
        family = kind(PREFIX + metric.name, metric.help, labels=ENGINE_LABELS)
        for labels, owner in owners.items():
            family.add_metric(labels, float(metric.value(owner)))
        yield family
    for time in DURATION_METRICS:
        histogram = HistogramMetricFamily(PREFIX + time.name, time.help, labels=ENGINE_LABELS)
        for labels, owner in owners.items():
            took = time.value(owner)
            histogram.add_metric(labels, took.cumulative(), took.sum_seconds)
        yield histogram


def names() -> Iterable[str]:
    """Return the names of all metrics."""
    plain = (metric.name for metric in (*DEVICE_METRICS, *ENGINE_METRICS))
    times = (f"{metric.name}_{part}" for metric in DURATION_METRICS for part in ("bucket", "count", "sum"))
    return (READABLE, *(PREFIX + name for name in (*plain, *times)))
