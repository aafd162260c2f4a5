"""Build Prometheus metric families from a ledger snapshot, for `kvctl export` and for vLLM's /metrics.

They need prometheus_client. The core does not depend on it, so it is imported when a scrape asks for metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot
from kvcached_core.ledger.tools.metric_definitions import DEVICE_METRICS, DURATION_METRICS, ENGINE_METRICS

if TYPE_CHECKING:
    from prometheus_client.core import Metric

LabelValues = tuple[str, ...]


def live_ranks(device: DeviceSnapshot) -> Iterator[OwnerSnapshot]:
    """Yield the ranks to report. A dead rank is left out: a live rank may have its name and number."""
    return (owner for owner in device.owners if owner.live and owner.written)


def device_families(
    prefix: str, labels: Sequence[str], devices: Mapping[LabelValues, DeviceSnapshot]
) -> Iterator[Metric]:
    """Yield every metric of devices. `devices` maps the label values of a device to its snapshot."""
    from prometheus_client.core import GaugeMetricFamily

    for metric in DEVICE_METRICS:
        family = GaugeMetricFamily(prefix + metric.name, metric.help, labels=labels)
        for label_values, device in devices.items():
            family.add_metric(label_values, float(metric.value(device)))
        yield family


def rank_families(
    prefix: str, labels: Sequence[str], ranks: Mapping[LabelValues, OwnerSnapshot]
) -> Iterator[Metric]:
    """Yield every metric of ranks. `ranks` maps the label values of a rank to its snapshot."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    for metric in ENGINE_METRICS:
        kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
        family = kind(prefix + metric.name, metric.help, labels=labels)
        for label_values, owner in ranks.items():
            family.add_metric(label_values, float(metric.value(owner)))
        yield family
    for duration in DURATION_METRICS:
        histogram = HistogramMetricFamily(prefix + duration.name, duration.help, labels=labels)
        for label_values, owner in ranks.items():
            reading = duration.value(owner)
            histogram.add_metric(label_values, reading.cumulative(), reading.sum_seconds)
        yield histogram


def metric_names(prefix: str) -> Iterable[str]:
    """Return the names of all samples that the families of devices and ranks have."""
    single = (metric.name for metric in (*DEVICE_METRICS, *ENGINE_METRICS))
    parts = ("bucket", "count", "sum")
    histograms = (f"{metric.name}_{part}" for metric in DURATION_METRICS for part in parts)
    return tuple(prefix + name for name in (*single, *histograms))
