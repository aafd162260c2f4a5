"""`kvctl check`: hold the live ledgers against their invariants."""

from __future__ import annotations

import argparse

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import snapshot
from kvctl.devices import choose_devices
from kvctl.exit_codes import ExitCode
from kvctl.output import print_json, print_table, say


def run_check(arguments: argparse.Namespace) -> ExitCode:
    """Print a line for each device, and each invariant that does not hold."""
    devices = choose_devices(snapshot(Runtime.open(arguments.runtime_dir, create=False)), arguments.device)
    wrong = {device.folder: check(device) for device in devices}
    if arguments.json:
        found = [
            {"uuid": device.uuid, "settled": device.settled, "engines": len(device.owners),
             "violations": wrong[device.folder]}
            for device in devices
        ]  # fmt: skip
        print_json({"sound": not any(wrong.values()), "devices": found})
    elif devices:
        rows = [
            (device.uuid, str(len(device.owners)), "error" if wrong[device.folder] else "ok")
            for device in devices
        ]
        print_table(("DEVICE", ">SLOTS", "STATUS"), rows)
    else:
        say("there is no ledger to check (kvctl doctor tells where it looked)")
    for device in devices:
        if not device.settled:
            say(f"{device.uuid}: its engines never paused, so sizes were not held against each other: repeat")
        for sentence in wrong[device.folder]:
            say(sentence)
    return ExitCode.INTEGRITY if any(wrong.values()) else ExitCode.OK
