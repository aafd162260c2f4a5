"""`kvctl list`: who holds how much of which device."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvcached_core.units import format_size
from kvctl.codes import Code, no_such_engine
from kvctl.devices import choose_devices
from kvctl.output import print_json, print_table, say

_COLUMNS = (
    "NAME", ">RANK", "DEVICE", "ENGINE", "MODEL", ">USED", ">CACHED", ">SPARE", ">HELD", ">LIMIT", ">FLOOR",
    "STATE",
)  # fmt: skip
_DEVICE_FIELDS = (
    "uuid", "capacity_bytes", "headroom_bytes", "free_bytes", "total_bytes", "leased_bytes", "ready_bytes",
    "damage",
)  # fmt: skip


def run_list(arguments: argparse.Namespace) -> Code:
    """Print engines, all or those named."""
    devices = choose_devices(snapshot(Runtime.open(arguments.runtime_dir, create=False)), arguments.device)
    if arguments.names:
        devices = _only(devices, arguments.names)
    if arguments.json:
        print_json({"devices": [device_data(device) for device in devices]})
    else:
        _print(devices)
    wrong = [sentence for device in devices for sentence in check(device)]
    for sentence in wrong:
        say(sentence)
    return Code.INTEGRITY if wrong else Code.OK


def _only(devices: Iterable[DeviceSnapshot], names: list[str]) -> list[DeviceSnapshot]:
    devices = list(devices)
    there = {owner.name for device in devices for owner in device.owners}
    for name in names:
        if name not in there:
            raise no_such_engine(name, there)
    chosen = []
    for device in devices:
        owners = tuple(owner for owner in device.owners if owner.name in names)
        if owners:
            chosen.append(dataclasses.replace(device, owners=owners))
    return chosen


def _print(devices: Iterable[DeviceSnapshot]) -> None:
    devices = list(devices)
    rows = [_row(device, owner) for device in devices for owner in device.owners]
    if not rows:
        say("no engine is running (kvctl doctor tells where it looked)")
        return
    print_table(_COLUMNS, rows)


def _row(device: DeviceSnapshot, owner: OwnerSnapshot) -> tuple[str, ...]:
    sizes = (owner.used_bytes, owner.cached_bytes, owner.spare_bytes, owner.ready_bytes)
    limit = "device" if owner.limit_bytes >= device.capacity_bytes else format_size(owner.limit_bytes)
    return (
        owner.name, str(owner.rank), device.uuid, owner.engine, owner.model, *map(format_size, sizes),
        limit, format_size(owner.floor_bytes), state(owner),
    )  # fmt: skip


def state(owner: OwnerSnapshot) -> str:
    """Return one word for how an engine is."""
    if not owner.live:
        return "ended"
    if not owner.heard:
        return "returning"
    if not owner.granule_bytes:
        return "starting"
    return "short" if owner.demand_bytes else "running"


def device_data(device: DeviceSnapshot) -> dict[str, Any]:
    """Return a device as plain data, bytes as numbers."""
    data = {field: getattr(device, field) for field in _DEVICE_FIELDS}
    engines = []
    for owner in device.owners:
        derived = {"state": state(owner), "spare_bytes": owner.spare_bytes, "limit_bytes": owner.limit_bytes}
        engines.append({**dataclasses.asdict(owner), **derived, "floor_bytes": owner.floor_bytes})
    return {**data, "engines": engines}
