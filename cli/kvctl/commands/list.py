"""`kvctl list`: show the memory that each engine holds on each device."""

from __future__ import annotations

import argparse

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import snapshot
from kvctl.devices import choose_devices
from kvctl.exit_codes import ExitCode
from kvctl.listing import check_names, device_data, list_text, names_in
from kvctl.output import print_json, say, write


def run_list(arguments: argparse.Namespace) -> ExitCode:
    """Print all engines, or the engines named. Broken invariants are reported and end with INTEGRITY."""
    devices = choose_devices(snapshot(Runtime.open(arguments.runtime_dir, create=False)), arguments.device)
    check_names(devices, arguments.names)
    names = names_in(devices, arguments.names)
    if arguments.json:
        print_json({"devices": [device_data(device, names) for device in devices]})
    else:
        text = list_text(devices, names, arguments.wide)
        write(text)
        if not text:
            say("no engine is running (kvctl doctor shows the runtime directory that was searched)")
    broken = [sentence for device in devices for sentence in check(device)]
    for sentence in broken:
        say(sentence)
    return ExitCode.INTEGRITY if broken else ExitCode.OK
