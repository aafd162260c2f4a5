"""The figures that monitoring is told of a ledger: their names, what they mean, and how they are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from kvcached_core.histogram import HistogramReading
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot


class DeviceFigure(NamedTuple):
    """A gauge of a device."""

    name: str
    help: str
    value: Callable[[DeviceSnapshot], float]


class EngineFigure(NamedTuple):
    """A gauge or a counter of one rank of an engine."""

    name: str
    help: str
    value: Callable[[OwnerSnapshot], float]
    counter: bool = False


class TimeFigure(NamedTuple):
    """A histogram of one rank of an engine."""

    name: str
    help: str
    value: Callable[[OwnerSnapshot], HistogramReading]


def _word(name: str) -> Callable[[OwnerSnapshot], float]:
    return lambda owner: float(getattr(owner, name))


def _private(device: DeviceSnapshot) -> int:
    return sum(owner.private_now_bytes for owner in device.owners)


def asked_bytes(owner: OwnerSnapshot, now_ms: int) -> int:
    """Return what it is asked to give back and still holds; what was asked lapses unless asked again."""
    if owner.target_bytes == 0 or now_ms >= owner.asked_until_ms:
        return 0
    return max(0, owner.leased_bytes - owner.target_bytes)


def _asked(owner: OwnerSnapshot) -> float:
    return asked_bytes(owner, time.monotonic_ns() // 1_000_000)


DEVICE_FIGURES = (
    DeviceFigure("device_capacity_bytes", "What engines share of the device.",
                 lambda device: device.capacity_bytes),
    DeviceFigure("device_headroom_bytes", "What of it is never leased.",
                 lambda device: device.headroom_bytes),
    DeviceFigure("device_leased_bytes", "What all engines were promised.",
                 lambda device: device.leased_bytes),
    DeviceFigure("device_total_bytes", "What the driver calls total, as of the latest lease.",
                 lambda device: device.total_bytes),
    DeviceFigure("device_free_bytes", "What the driver called free at the latest lease.",
                 lambda device: device.free_bytes),
    DeviceFigure("device_other_bytes",
                 "What is not KV memory: weights, activations, other processes; as of the latest lease.",
                 lambda device: _private(device) + device.outside_bytes),
    DeviceFigure("device_outside_bytes",
                 "What processes held that the ledger does not know, as of the latest lease.",
                 lambda device: device.outside_bytes),
    DeviceFigure("device_floors_bytes", "All floors together.",
                 lambda device: sum(owner.floor_bytes for owner in device.owners)),
    DeviceFigure("device_stale_slots", "Slots whose owner is dead and which nobody has swept yet.",
                 lambda device: sum(not owner.live for owner in device.owners)),
    DeviceFigure("device_sound", "1 if every invariant of the ledger holds.",
                 lambda device: not check(device)),
)  # fmt: skip
ENGINE_FIGURES = (
    EngineFigure("held_bytes", "KV memory that exists.", _word("ready_bytes")),
    EngineFigure("leased_bytes", "KV memory that is promised.", _word("leased_bytes")),
    EngineFigure("used_bytes", "In blocks that requests hold.", _word("used_bytes")),
    EngineFigure("cached_bytes", "In blocks that only the prefix cache keeps.",
                 _word("cached_bytes")),
    EngineFigure("spare_bytes", "Ready and empty.", _word("spare_bytes")),
    EngineFigure("stranded_bytes", "The rest of partly used granules.", _word("stranded_bytes")),
    EngineFigure("needed_bytes", "What requests hold or are about to take.", _word("needed_bytes")),
    EngineFigure("wanted_bytes", "That, and cache and spare.", _word("wanted_bytes")),
    EngineFigure("demand_bytes", "Asked for and not got.", _word("demand_bytes")),
    EngineFigure("asked_bytes", "Asked to give back, and still held.",
                 _asked),
    EngineFigure("limit_bytes", "What it may hold at most.", _word("limit_bytes")),
    EngineFigure("floor_bytes", "What it can always get back.", _word("floor_bytes")),
    EngineFigure("weight", "Its share when there is not enough.", _word("weight_wanted")),
    EngineFigure("private_bytes", "What the worker takes outside its KV memory.",
                 _word("private_now_bytes")),
    EngineFigure("busy", "1 while requests run.", _word("busy")),
    EngineFigure("leases_total", "Leases that got something.", _word("leases"), True),
    EngineFigure("lease_bytes_total", "Sum of all that was leased.", _word("lease_bytes"), True),
    EngineFigure("refusals_total", "Leases that got less than asked for.", _word("refusals"), True),
    EngineFigure("reclaims_total", "Times asked to give back.", _word("reclaims"), True),
    EngineFigure("evictions_total", "Cached blocks evicted for memory.", _word("evictions"), True),
    EngineFigure("preemptions_total", "Requests preempted.", _word("preemptions"), True),
    EngineFigure("driver_errors_total", "Promises that the driver could not keep.",
                 _word("create_failures"), True),
    EngineFigure("maps_total", "Granules mapped.", _word("maps"), True),
    EngineFigure("unmaps_total", "Granules unmapped.", _word("unmaps"), True),
)  # fmt: skip
TIME_FIGURES = (
    TimeFigure("map_seconds", "How long it took to map a granule.", lambda owner: owner.map_seconds),
    TimeFigure("reclaim_seconds", "From being asked to give back until it was met.",
               lambda owner: owner.reclaim_seconds),
)  # fmt: skip
