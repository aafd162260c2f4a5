"""The metrics of a ledger for monitoring: name, HELP text, and how each is read from a snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from kvcached_core.histogram import HistogramReading
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot


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


class DurationMetric(NamedTuple):
    """A histogram of durations, in seconds, of one rank of an engine."""

    name: str
    help: str
    value: Callable[[OwnerSnapshot], HistogramReading]


def _field(name: str) -> Callable[[OwnerSnapshot], float]:
    return lambda owner: float(getattr(owner, name))


def _private(device: DeviceSnapshot) -> int:
    return sum(owner.private_now_bytes for owner in device.owners)


def asked_bytes(owner: OwnerSnapshot, now_ms: int) -> int:
    """Return the bytes that a rank has been asked to give back and still holds; 0 once the request lapsed."""
    if owner.target_bytes == 0 or now_ms >= owner.asked_until_ms:
        return 0
    return max(0, owner.leased_bytes - owner.target_bytes)


def _asked_now(owner: OwnerSnapshot) -> float:
    return asked_bytes(owner, time.monotonic_ns() // 1_000_000)


DEVICE_METRICS = (
    DeviceMetric("device_capacity_bytes", "Device memory that engines share.",
                 lambda device: device.capacity_bytes),
    DeviceMetric("device_headroom_bytes", "Part of the capacity that is never leased.",
                 lambda device: device.headroom_bytes),
    DeviceMetric("device_leased_bytes", "KV memory promised to all engines.",
                 lambda device: device.leased_bytes),
    DeviceMetric("device_total_bytes", "Total memory reported by the driver at the latest lease.",
                 lambda device: device.total_bytes),
    DeviceMetric("device_free_bytes", "Free memory reported by the driver at the latest lease.",
                 lambda device: device.free_bytes),
    DeviceMetric("device_other_bytes",
                 "Memory that is not KV memory (weights, activations, other processes) at the latest lease.",
                 lambda device: _private(device) + device.outside_bytes),
    DeviceMetric("device_outside_bytes",
                 "Memory used by processes outside the ledger, at the latest lease.",
                 lambda device: device.outside_bytes),
    DeviceMetric("device_floors_bytes", "Sum of all engines' floors.",
                 lambda device: sum(owner.floor_bytes for owner in device.owners)),
    DeviceMetric("device_stale_slots", "Slots of dead workers that no engine has freed yet.",
                 lambda device: sum(not owner.live for owner in device.owners)),
    DeviceMetric("device_sound", "1 if every invariant of the ledger holds.",
                 lambda device: not check(device)),
)  # fmt: skip
ENGINE_METRICS = (
    EngineMetric("held_bytes", "KV memory that exists.", _field("ready_bytes")),
    EngineMetric("leased_bytes", "KV memory promised to the engine.", _field("leased_bytes")),
    EngineMetric("used_bytes", "KV memory in blocks that requests hold.", _field("used_bytes")),
    EngineMetric("cached_bytes", "KV memory in blocks that only the prefix cache keeps.",
                 _field("cached_bytes")),
    EngineMetric("spare_bytes", "KV memory that exists and is empty.", _field("spare_bytes")),
    EngineMetric("stranded_bytes", "Empty blocks in granules that are partly used.",
                 _field("stranded_bytes")),
    EngineMetric("needed_bytes", "KV memory that requests hold or are about to take.",
                 _field("needed_bytes")),
    EngineMetric("wanted_bytes", "KV memory wanted: needed, cached and spare.", _field("wanted_bytes")),
    EngineMetric("demand_bytes", "Bytes the engine wants and has not been granted.",
                 _field("demand_bytes")),
    EngineMetric("asked_bytes", "Bytes the engine was asked to give back and still holds.", _asked_now),
    EngineMetric("limit_bytes", "Most KV memory the engine may hold.", _field("limit_bytes")),
    EngineMetric("floor_bytes", "KV memory the engine can always get back.", _field("floor_bytes")),
    EngineMetric("weight", "The engine's share of memory when demand exceeds the device.",
                 _field("weight_wanted")),
    EngineMetric("private_bytes", "Memory the worker uses outside its KV cache.",
                 _field("private_now_bytes")),
    EngineMetric("busy", "1 while requests run.", _field("busy")),
    EngineMetric("leases_total", "Leases that were granted memory.", _field("leases"), True),
    EngineMetric("lease_bytes_total", "Bytes leased since the engine started.", _field("lease_bytes"), True),
    EngineMetric("refusals_total", "Leases that got less than they asked for.", _field("refusals"), True),
    EngineMetric("reclaims_total", "Times the engine was asked to give memory back.", _field("reclaims"),
                 True),
    EngineMetric("evictions_total", "Cached blocks evicted to free memory.", _field("evictions"), True),
    EngineMetric("preemptions_total", "Requests preempted.", _field("preemptions"), True),
    EngineMetric("driver_errors_total", "Leases that the driver could not fill.",
                 _field("create_failures"), True),
    EngineMetric("maps_total", "Granules mapped.", _field("maps"), True),
    EngineMetric("unmaps_total", "Granules unmapped.", _field("unmaps"), True),
)  # fmt: skip
DURATION_METRICS = (
    DurationMetric("map_seconds", "Time to map a granule.", lambda owner: owner.map_seconds),
    DurationMetric("reclaim_seconds", "Time from being asked to give memory back until it was given back.",
                   lambda owner: owner.reclaim_seconds),
)  # fmt: skip
