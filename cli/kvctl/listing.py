"""`kvctl list`: who holds how much of which device."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Container, Iterable, Sequence
from typing import Any

from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvcached_core.units import format_size
from kvctl.codes import Code, no_such_engine
from kvctl.devices import choose_devices
from kvctl.output import DASH, print_json, print_table, say, short_size

_COLUMNS = (
    "NAME", ">RANK", ">USED", ">CACHED", ">SPARE", ">HELD", ">FLOOR", ">LIMIT", ">WEIGHT", ">DEMAND",
    ">ASKED", "STATE",
)  # fmt: skip
_WIDE_COLUMNS = ("ENGINE", "MODEL", ">WORKER")
_DEVICE_FIELDS = (
    "uuid", "capacity_bytes", "headroom_bytes", "free_bytes", "total_bytes", "leased_bytes", "ready_bytes",
    "outside_bytes", "damage",
)  # fmt: skip


def run_list(arguments: argparse.Namespace) -> Code:
    """Print engines, all or those named."""
    devices = choose_devices(snapshot(Runtime.open(arguments.runtime_dir, create=False)), arguments.device)
    names = set(arguments.names) or {owner.name for device in devices for owner in device.owners}
    check_names(devices, names)
    if arguments.json:
        print_json({"devices": [device_data(device, names) for device in devices]})
    else:
        _print(devices, names, arguments.wide)
    wrong = [sentence for device in devices for sentence in check(device)]
    for sentence in wrong:
        say(sentence)
    return Code.INTEGRITY if wrong else Code.OK


def check_names(devices: Iterable[DeviceSnapshot], names: Iterable[str]) -> None:
    """Raise Failure for the first name that no engine has."""
    there = {owner.name for device in devices for owner in device.owners}
    for name in sorted(set(names) - there):
        raise no_such_engine(name, there)


def _print(devices: Sequence[DeviceSnapshot], names: Container[str], wide: bool) -> None:
    """Print a line for each device, and a table of the engines on it."""
    now_ms = time.monotonic_ns() // 1_000_000
    shown = 0
    for place, device in enumerate(devices):
        rows = [_row(device, owner, now_ms, wide) for owner in device.owners if owner.name in names]
        if not rows:
            continue
        print("\n" * bool(shown) + device_line(place, device))
        print_table((*_COLUMNS, *(_WIDE_COLUMNS if wide else ())), rows)
        shown += len(rows)
    if not shown:
        say("no engine is running (kvctl doctor tells where it looked)")


def device_line(place: int, device: DeviceSnapshot) -> str:
    """Return a device in one line; free and outside are as of the latest lease."""
    parts = {
        "capacity": device.capacity_bytes, "leased": device.leased_bytes, "free": device.free_bytes,
        "outside": device.outside_bytes,
    }  # fmt: skip
    return f"{place}: {device.uuid}  " + ", ".join(
        f"{name} {format_size(size)}" for name, size in parts.items()
    )


def _row(device: DeviceSnapshot, owner: OwnerSnapshot, now_ms: int, wide: bool) -> tuple[str, ...]:
    held = (owner.used_bytes, owner.cached_bytes, owner.spare_bytes, owner.ready_bytes, owner.floor_bytes)
    limit = "device" if owner.limit_bytes >= device.capacity_bytes else short_size(owner.limit_bytes)
    wants = (owner.demand_bytes, asked_bytes(owner, now_ms))
    return (
        owner.name, str(owner.rank), *map(short_size, held), limit, str(owner.weight_wanted),
        *(short_size(size) if size else DASH for size in wants), state(owner),
        *((owner.engine, owner.model, str(owner.worker_pid)) if wide else ()),
    )  # fmt: skip


def asked_bytes(owner: OwnerSnapshot, now_ms: int) -> int:
    """Return what it is asked to give back and still holds; what was asked lapses unless asked again."""
    if owner.target_bytes == 0 or now_ms >= owner.asked_until_ms:
        return 0
    return max(0, owner.leased_bytes - owner.target_bytes)


def state(owner: OwnerSnapshot) -> str:
    """Return one word for how an engine is."""
    if not owner.live:
        return "ended"
    if not owner.heard:
        return "returning"
    if owner.starting_bytes:
        return "waiting"
    if not owner.granule_bytes:
        return "starting"
    return "short" if owner.demand_bytes else "running"


def device_data(device: DeviceSnapshot, names: Container[str]) -> dict[str, Any]:
    """Return a device and those engines on it as plain data, bytes as numbers."""
    now_ms = time.monotonic_ns() // 1_000_000
    data = {field: getattr(device, field) for field in _DEVICE_FIELDS}
    engines = [
        {
            **dataclasses.asdict(owner),
            "state": state(owner),
            "spare_bytes": owner.spare_bytes,
            "limit_bytes": owner.limit_bytes,
            "floor_bytes": owner.floor_bytes,
            "weight": owner.weight_wanted,
            "asked_bytes": asked_bytes(owner, now_ms),
        }
        for owner in device.owners
        if owner.name in names
    ]
    return {**data, "engines": engines}
