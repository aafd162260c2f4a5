"""`kvctl check`: check the invariants of all ledgers."""

from __future__ import annotations

import argparse

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import snapshot
from kvctl.devices import choose_devices
from kvctl.exit_codes import ExitCode
from kvctl.output import print_json, print_table, say


def run_check(arguments: argparse.Namespace) -> ExitCode:
    """Print a line for each device, then a sentence for each broken invariant."""
    devices = choose_devices(snapshot(Runtime.open(arguments.runtime_dir, create=False)), arguments.device)
    broken = {device.folder: check(device) for device in devices}
    if arguments.json:
        data = [
            {"uuid": device.uuid, "settled": device.settled, "engines": len(device.owners),
             "violations": broken[device.folder]}
            for device in devices
        ]  # fmt: skip
        print_json({"sound": not any(broken.values()), "devices": data})
    elif devices:
        rows = [
            (device.uuid, str(len(device.owners)), "error" if broken[device.folder] else "ok")
            for device in devices
        ]
        print_table(("DEVICE", ">SLOTS", "STATUS"), rows)
    else:
        say("there is no ledger to check (kvctl doctor shows the runtime directory that was searched)")
    for device in devices:
        if not device.settled:
            say(f"{device.uuid}: sizes were not compared, because they kept changing: run kvctl check again")
        for sentence in broken[device.folder]:
            say(sentence)
    return ExitCode.INTEGRITY if any(broken.values()) else ExitCode.OK
