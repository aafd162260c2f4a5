"""`kvctl list`: who holds how much of which device."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from kvcached_core.histogram import HistogramReading
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvcached_core.ledger.tools.metric_definitions import DURATION_METRICS, asked_bytes
from kvcached_core.units import format_size
from kvctl.bars import COLOURS, Part, bar, can_draw
from kvctl.codes import Code, no_such_engine
from kvctl.devices import choose_devices
from kvctl.output import DASH, line_width, percent, print_json, render, say, short_size, table_text, write

_COLUMNS = (
    "NAME", ">RANK", ">USED", ">CACHED", ">SPARE", ">HELD", ">FLOOR", ">LIMIT", ">WEIGHT", ">DEMAND",
    ">ASKED", "STATE",
)  # fmt: skip
_WIDE_COLUMNS = ("ENGINE", "MODEL", ">WORKER")
_BAR_CELLS, _LEGEND_CELLS, _WIDTH = 40, 52, 100
_DEVICE_FIELDS = (
    "uuid", "capacity_bytes", "headroom_bytes", "free_bytes", "total_bytes", "leased_bytes", "ready_bytes",
    "outside_bytes", "damage",
)  # fmt: skip


def run_list(arguments: argparse.Namespace) -> Code:
    """Print engines, all or those named."""
    devices = choose_devices(snapshot(Runtime.open(arguments.runtime_dir, create=False)), arguments.device)
    check_names(devices, arguments.names)
    names = names_in(devices, arguments.names)
    if arguments.json:
        print_json({"devices": [device_data(device, names) for device in devices]})
    else:
        text = list_text(devices, names, arguments.wide)
        write(text)
        if not text:
            say("no engine is running (kvctl doctor tells where it looked)")
    wrong = [sentence for device in devices for sentence in check(device)]
    for sentence in wrong:
        say(sentence)
    return Code.INTEGRITY if wrong else Code.OK


def names_in(devices: Iterable[DeviceSnapshot], chosen: Iterable[str]) -> set[str]:
    """Return the names chosen, or all there are."""
    return set(chosen) or {owner.name for device in devices for owner in device.owners}


def check_names(devices: Iterable[DeviceSnapshot], names: Iterable[str]) -> None:
    """Raise Failure for the first name that no engine has."""
    there = {owner.name for device in devices for owner in device.owners}
    for name in sorted(set(names) - there):
        raise no_such_engine(name, there)


def list_text(devices: Sequence[DeviceSnapshot], names: Container[str], wide: bool,
              width: int | None = None) -> str:  # fmt: skip
    """Return two lines for each device that has such an engine, and a table of them."""
    return "\n".join(_blocks(devices, names, wide, width))


def _blocks(devices: Sequence[DeviceSnapshot], names: Container[str], wide: bool,
            width: int | None) -> Iterator[str]:  # fmt: skip
    now_ms = time.monotonic_ns() // 1_000_000
    columns = (*_COLUMNS, *(_WIDE_COLUMNS if wide else ()))
    for place, device in enumerate(devices):
        rows = [_row(device, owner, now_ms, wide) for owner in device.owners if owner.name in names]
        if rows:
            yield f"{device_line(place, device)}\n{_device_bar(device)}{table_text(columns, rows, width)}"


def device_line(place: int, device: DeviceSnapshot) -> str:
    """Return a device in one line; free and outside are as of the latest lease."""
    parts = {
        "capacity": device.capacity_bytes, "leased": device.leased_bytes, "free": device.free_bytes,
        "outside": device.outside_bytes,
    }  # fmt: skip
    return f"{place}: {device.uuid}  " + ", ".join(
        f"{name} {format_size(size)}" for name, size in parts.items()
    )


def _device_bar(device: DeviceSnapshot) -> str:
    """Return the device as a bar, with what its parts mean and the share that is leased."""
    from rich.text import Text

    ascii_only = not can_draw()
    width = min(_WIDTH, line_width())
    cells = max(10, min(_BAR_CELLS, width - _LEGEND_CELLS))
    drawn = bar(device_parts(device), device.capacity_bytes, cells, ascii_only=ascii_only)
    legend = [Text.assemble(" ", bar([Part(kind, 1)], 1, 1, ascii_only=ascii_only), kind)
              for kind in COLOURS if kind != "stranded"]  # fmt: skip
    share = percent(device.leased_bytes, device.capacity_bytes)
    return render(Text.assemble("   ", drawn, f" {share} leased ", *legend), width=_WIDTH)


def device_parts(device: DeviceSnapshot) -> list[Part]:
    """Return what all engines hold of a device by kind, and what others hold as of the latest lease."""
    used = sum(owner.used_bytes for owner in device.owners)
    cached = sum(owner.cached_bytes for owner in device.owners)
    rest = max(0, device.ready_bytes - used - cached)  # also what is between blocks in use
    private = sum(owner.private_now_bytes for owner in device.owners)
    return [Part("used", used), Part("cached", cached), Part("spare", rest),
            Part("other", private + device.outside_bytes)]  # fmt: skip


def _row(device: DeviceSnapshot, owner: OwnerSnapshot, now_ms: int, wide: bool) -> tuple[str, ...]:
    held = (owner.used_bytes, owner.cached_bytes, owner.spare_bytes, owner.ready_bytes, owner.floor_bytes)
    limit = "device" if owner.limit_bytes >= device.capacity_bytes else short_size(owner.limit_bytes)
    wants = (owner.demand_bytes, asked_bytes(owner, now_ms))
    return (
        owner.name, str(owner.rank), *map(short_size, held), limit, str(owner.weight_wanted),
        *(short_size(size) if size else DASH for size in wants), state(owner, now_ms),
        *((owner.engine, owner.model, str(owner.worker_pid)) if wide else ()),
    )  # fmt: skip


def state(owner: OwnerSnapshot, now_ms: int | None = None) -> str:
    """Return one word, or two, for how an engine is."""
    if not owner.live:
        return "ended"
    if not owner.heard:
        return "returning"
    if owner.starting_bytes:
        return "waiting"
    if not owner.granule_bytes:
        return "starting"
    if owner.leased_bytes > max(owner.limit_bytes, owner.granule_bytes):
        return "over limit"
    if owner.demand_bytes > owner.coming_bytes:
        return "short"
    if asked_bytes(owner, time.monotonic_ns() // 1_000_000 if now_ms is None else now_ms):
        return "asked"
    return "busy" if owner.busy else "idle" if owner.idle_since_ms else "running"


def _times_data(times: HistogramReading) -> dict[str, Any]:
    return {"count": times.total, "sum_seconds": times.sum_seconds, "buckets": dict(times.cumulative())}


def device_data(device: DeviceSnapshot, names: Container[str]) -> dict[str, Any]:
    """Return a device and those engines on it as plain data, bytes as numbers."""
    now_ms = time.monotonic_ns() // 1_000_000
    data = {field: getattr(device, field) for field in _DEVICE_FIELDS}
    engines = [
        {
            **dataclasses.asdict(owner),
            "state": state(owner, now_ms),
            "spare_bytes": owner.spare_bytes,
            "limit_bytes": owner.limit_bytes,
            "floor_bytes": owner.floor_bytes,
            "weight": owner.weight_wanted,
            "asked_bytes": asked_bytes(owner, now_ms),
            **{figure.name: _times_data(figure.value(owner)) for figure in DURATION_METRICS},
        }
        for owner in device.owners
        if owner.name in names
    ]
    return {**data, "engines": engines}
