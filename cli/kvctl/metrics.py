"""What Prometheus is told: each metric as data, and the collector that reads the ledgers when it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvctl.codes import Failure
from kvctl.devices import choose_devices
from kvctl.listing import asked_bytes

DEVICE_LABELS = ("gpu", "UUID")
ENGINE_LABELS = (*DEVICE_LABELS, "engine", "model", "name", "rank")
READABLE = "kvcached_ledger_readable"


class DeviceMetric(NamedTuple):
    """A gauge of a device."""

    name: str
    help: str
    value: Callable[[DeviceSnapshot], float]


class EngineMetric(NamedTuple):
    """A gauge or a counter of one rank of an engine."""

    name: str
    help: str
    value: Callable[[OwnerSnapshot], float]
    counter: bool = False


def _word(name: str) -> Callable[[OwnerSnapshot], float]:
    return lambda owner: float(getattr(owner, name))


def _private(device: DeviceSnapshot) -> int:
    return sum(owner.private_now_bytes for owner in device.owners)


DEVICE_METRICS = (
    DeviceMetric("kvcached_device_capacity_bytes", "What engines share of the device.",
                 lambda device: device.capacity_bytes),
    DeviceMetric("kvcached_device_headroom_bytes", "What of it is never leased.",
                 lambda device: device.headroom_bytes),
    DeviceMetric("kvcached_device_leased_bytes", "What all engines were promised.",
                 lambda device: device.leased_bytes),
    DeviceMetric("kvcached_device_total_bytes", "What the driver calls total, as of the latest lease.",
                 lambda device: device.total_bytes),
    DeviceMetric("kvcached_device_free_bytes", "What the driver called free at the latest lease.",
                 lambda device: device.free_bytes),
    DeviceMetric("kvcached_device_other_bytes",
                 "What is not KV memory: weights, activations, other processes; as of the latest lease.",
                 lambda device: _private(device) + device.outside_bytes),
    DeviceMetric("kvcached_device_outside_bytes",
                 "What processes held that the ledger does not know, as of the latest lease.",
                 lambda device: device.outside_bytes),
    DeviceMetric("kvcached_device_floors_bytes", "All floors together.",
                 lambda device: sum(owner.floor_bytes for owner in device.owners)),
    DeviceMetric("kvcached_device_stale_slots", "Slots whose owner is dead and which nobody has swept yet.",
                 lambda device: sum(not owner.live for owner in device.owners)),
    DeviceMetric("kvcached_device_sound", "1 if every invariant of the ledger holds.",
                 lambda device: not check(device)),
)  # fmt: skip
ENGINE_METRICS = (
    EngineMetric("kvcached_held_bytes", "KV memory that exists.", _word("ready_bytes")),
    EngineMetric("kvcached_leased_bytes", "KV memory that is promised.", _word("leased_bytes")),
    EngineMetric("kvcached_used_bytes", "In blocks that requests hold.", _word("used_bytes")),
    EngineMetric("kvcached_cached_bytes", "In blocks that only the prefix cache keeps.",
                 _word("cached_bytes")),
    EngineMetric("kvcached_spare_bytes", "Ready and empty.", _word("spare_bytes")),
    EngineMetric("kvcached_stranded_bytes", "The rest of partly used granules.", _word("stranded_bytes")),
    EngineMetric("kvcached_needed_bytes", "What requests hold or are about to take.", _word("needed_bytes")),
    EngineMetric("kvcached_wanted_bytes", "That, and cache and spare.", _word("wanted_bytes")),
    EngineMetric("kvcached_demand_bytes", "Asked for and not got.", _word("demand_bytes")),
    EngineMetric("kvcached_asked_bytes", "Asked to give back, and still held.",
                 lambda owner: asked_bytes(owner, time.monotonic_ns() // 1_000_000)),
    EngineMetric("kvcached_limit_bytes", "What it may hold at most.", _word("limit_bytes")),
    EngineMetric("kvcached_floor_bytes", "What it can always get back.", _word("floor_bytes")),
    EngineMetric("kvcached_weight", "Its share when there is not enough.", _word("weight_wanted")),
    EngineMetric("kvcached_private_bytes", "What the worker takes outside its KV memory.",
                 _word("private_now_bytes")),
    EngineMetric("kvcached_busy", "1 while requests run.", _word("busy")),
    EngineMetric("kvcached_leases_total", "Leases that got something.", _word("leases"), True),
    EngineMetric("kvcached_lease_bytes_total", "Sum of all that was leased.", _word("lease_bytes"), True),
    EngineMetric("kvcached_refusals_total", "Leases that got less than asked for.", _word("refusals"), True),
    EngineMetric("kvcached_reclaims_total", "Times asked to give back.", _word("reclaims"), True),
    EngineMetric("kvcached_evictions_total", "Cached blocks evicted for memory.", _word("evictions"), True),
    EngineMetric("kvcached_preemptions_total", "Requests preempted.", _word("preemptions"), True),
    EngineMetric("kvcached_driver_errors_total", "Promises that the driver could not keep.",
                 _word("create_failures"), True),
    EngineMetric("kvcached_maps_total", "Granules mapped.", _word("maps"), True),
    EngineMetric("kvcached_unmaps_total", "Granules unmapped.", _word("unmaps"), True),
)  # fmt: skip


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
        family = GaugeMetricFamily(metric.name, metric.help, labels=DEVICE_LABELS)
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
        family = kind(metric.name, metric.help, labels=ENGINE_LABELS)
        for labels, owner in owners.items():
            family.add_metric(labels, float(metric.value(owner)))
        yield family


def names() -> Iterable[str]:
    """Return the names of all metrics."""
    return (READABLE, *(metric.name for metric in (*DEVICE_METRICS, *ENGINE_METRICS)))
