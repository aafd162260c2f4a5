"""`kvctl history`: show the latest events of the devices, the newest last."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvcached_core.events import Event, Value
from kvcached_core.ledger import history
from kvcached_core.ledger.file.runtime import DeviceFolder, Runtime
from kvcached_core.ledger.snapshot import snapshot
from kvcached_core.units import format_size
from kvctl.devices import choose_devices
from kvctl.exit_codes import ExitCode
from kvctl.output import DASH, print_json, print_table, say

_SHOWN_APART = ("device", "name", "slot")


class _Entry(NamedTuple):
    """An event, with the number of its device in `kvctl list`."""

    place: int
    event: Event


def run_history(arguments: argparse.Namespace) -> ExitCode:
    """Print the latest events of all engines, or of the engines named, which may have ended."""
    entries = sorted(_entries(arguments), key=lambda entry: entry.event.wall_seconds)[-arguments.count :]
    if arguments.json:
        print_json({"events": [_data(entry.event) for entry in entries]})
    elif entries:
        several = len({entry.place for entry in entries}) > 1
        columns = ("TIME", *([">DEVICE"] if several else []), "NAME", "EVENT", "DATA")
        print_table(columns, [_row(entry, several) for entry in entries])
    else:
        say("there are no events yet (kvctl list shows the engines that run)")
    return ExitCode.OK


def _entries(arguments: argparse.Namespace) -> Iterator[_Entry]:
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = snapshot(runtime)
    places = {device.folder: place for place, device in enumerate(devices)}
    for device in choose_devices(devices, arguments.device):
        folder = DeviceFolder(runtime.path / device.folder, runtime.file_mode)
        for event in history.read(folder):
            if not arguments.names or event.data.get("name") in arguments.names:
                yield _Entry(places[device.folder], event)


def _data(event: Event) -> dict[str, Value]:
    head: dict[str, Value] = {
        "kind": event.kind, "at_seconds": event.at_seconds, "wall_seconds": event.wall_seconds
    }  # fmt: skip
    return {**head, **event.data}


def _row(entry: _Entry, several: bool) -> tuple[str, ...]:
    event = entry.event
    seconds = event.wall_seconds
    stamp = time.strftime("%m-%d %H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1000):03}"
    place = (str(entry.place),) if several else ()
    return (stamp, *place, str(event.data.get("name", DASH)), event.kind, _describe(event.data))


def _describe(data: Mapping[str, Value]) -> str:
    """Return the data of an event, without device, engine and slot, and with units in words."""
    return ", ".join(_words(key, value) for key, value in data.items() if key not in _SHOWN_APART)


def _words(key: str, value: Value) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{key.removesuffix('_bytes')} {format_size(value)}"
    if key.endswith("_seconds") and isinstance(value, float):
        return f"{key.removesuffix('_seconds')} {value:.3g} s"
    return f"{key} {value}"
