"""Devices and their engines, as text and as plain data, for `list`, `watch` and kvtop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from kvcached_core.histogram import HistogramReading
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot
from kvcached_core.ledger.tools.metric_definitions import DURATION_METRICS, asked_bytes
from kvcached_core.units import format_size
from kvctl.charts import COLOURS, BarSegment, bar, can_draw
from kvctl.exit_codes import no_such_engine
from kvctl.output import DASH, line_width, percent, render, short_size, table_text

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


def names_in(devices: Iterable[DeviceSnapshot], chosen: Iterable[str]) -> set[str]:
    """Return the chosen names, or the names of all engines if none is chosen."""
    return set(chosen) or {owner.name for device in devices for owner in device.owners}


def check_names(devices: Iterable[DeviceSnapshot], names: Iterable[str]) -> None:
    """Raise CommandError for the first of `names` that no engine has."""
    known = {owner.name for device in devices for owner in device.owners}
    for name in sorted(set(names) - known):
        raise no_such_engine(name, known)


def list_text(devices: Sequence[DeviceSnapshot], names: Container[str], wide: bool,
              width: int | None = None) -> str:  # fmt: skip
    """Return two lines and a table of engines for each device that has an engine of these names."""
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
    """Return a device in one line. Free and outside memory are those of the latest lease."""
    sizes = {
        "capacity": device.capacity_bytes, "leased": device.leased_bytes, "free": device.free_bytes,
        "outside": device.outside_bytes,
    }  # fmt: skip
    return f"{place}: {device.uuid}  " + ", ".join(
        f"{name} {format_size(size)}" for name, size in sizes.items()
    )


def _device_bar(device: DeviceSnapshot) -> str:
    """Return the device as a bar, with a legend and the share that is leased."""
    from rich.text import Text

    ascii_only = not can_draw()
    width = min(_WIDTH, line_width())
    cells = max(10, min(_BAR_CELLS, width - _LEGEND_CELLS))
    drawn = bar(device_segments(device), device.capacity_bytes, cells, ascii_only=ascii_only)
    legend = [Text.assemble(" ", bar([BarSegment(kind, 1)], 1, 1, ascii_only=ascii_only), kind)
              for kind in COLOURS if kind != "stranded"]  # fmt: skip
    share = percent(device.leased_bytes, device.capacity_bytes)
    return render(Text.assemble("   ", drawn, f" {share} leased ", *legend), width=_WIDTH)


def device_segments(device: DeviceSnapshot) -> list[BarSegment]:
    """Return a device's memory by kind; other memory is that of the latest lease."""
    used = sum(owner.used_bytes for owner in device.owners)
    cached = sum(owner.cached_bytes for owner in device.owners)
    empty = max(0, device.ready_bytes - used - cached)  # spare and stranded
    private = sum(owner.private_now_bytes for owner in device.owners)
    return [BarSegment("used", used), BarSegment("cached", cached), BarSegment("spare", empty),
            BarSegment("other", private + device.outside_bytes)]  # fmt: skip


def _row(device: DeviceSnapshot, owner: OwnerSnapshot, now_ms: int, wide: bool) -> tuple[str, ...]:
    held = (owner.used_bytes, owner.cached_bytes, owner.spare_bytes, owner.ready_bytes, owner.floor_bytes)
    limit = "device" if owner.limit_bytes >= device.capacity_bytes else short_size(owner.limit_bytes)
    missing = (owner.demand_bytes, asked_bytes(owner, now_ms))
    return (
        owner.name, str(owner.rank), *map(short_size, held), limit, str(owner.weight_wanted),
        *(short_size(size) if size else DASH for size in missing), state(owner, now_ms),
        *((owner.engine, owner.model, str(owner.worker_pid)) if wide else ()),
    )  # fmt: skip


def state(owner: OwnerSnapshot, now_ms: int | None = None) -> str:
    """Return the state of an engine in one or two words."""
    if not owner.live:
        return "ended"
    if not owner.written:
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


def _histogram_data(reading: HistogramReading) -> dict[str, Any]:
    return {"count": reading.total, "sum_seconds": reading.sum_seconds, "buckets": dict(reading.cumulative())}


def _owner_data(owner: OwnerSnapshot) -> dict[str, Any]:
    data = dataclasses.asdict(owner)
    data["heard"] = data.pop("written")  # its name in version 1 of the JSON
    return data


def device_data(device: DeviceSnapshot, names: Container[str]) -> dict[str, Any]:
    """Return a device, and its engines of these names, as plain data with sizes in bytes."""
    now_ms = time.monotonic_ns() // 1_000_000
    data = {field: getattr(device, field) for field in _DEVICE_FIELDS}
    engines = [
        {
            **_owner_data(owner),
            "state": state(owner, now_ms),
            "spare_bytes": owner.spare_bytes,
            "limit_bytes": owner.limit_bytes,
            "floor_bytes": owner.floor_bytes,
            "weight": owner.weight_wanted,
            "asked_bytes": asked_bytes(owner, now_ms),
            **{metric.name: _histogram_data(metric.value(owner)) for metric in DURATION_METRICS},
        }
        for owner in device.owners
        if owner.name in names
    ]
    return {**data, "engines": engines}
