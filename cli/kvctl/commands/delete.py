"""`kvctl delete`: remove the slots of an engine that has ended, or reset the settings of a running one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot
from kvcached_core.ledger.tools.control import set_limit, set_weight
from kvcached_core.ledger.tools.discard import Discarded, discard
from kvcached_core.units import Size
from kvctl.devices import chosen_uuids
from kvctl.exit_codes import CommandError, ExitCode, no_such_engine
from kvctl.output import print_json, print_table

_WEIGHT = 100  # the default


def run_delete(arguments: argparse.Namespace) -> ExitCode:
    """Remove the slots of dead workers. A running engine is an error, or with --force reset to defaults."""
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = chosen_uuids(runtime, arguments.device)
    found = discard(runtime, arguments.name, devices)
    running = [each for each in found if each.live]
    if not found:
        names = (owner.name for device in snapshot(runtime) for owner in device.owners)
        raise no_such_engine(arguments.name, names)
    if running and arguments.force:
        set_limit(runtime, arguments.name, Size(percent=100.0), devices)
        set_weight(runtime, arguments.name, _WEIGHT, devices)
    _print(arguments, found)
    if running and not arguments.force:
        raise CommandError(
            ExitCode.FAILED,
            f"{arguments.name} is running, and its slots count memory in use. Stop the engine first, or "
            f"reset its limit and weight with kvctl delete --force {arguments.name}",
        )
    return ExitCode.OK


def _print(arguments: argparse.Namespace, found: Sequence[Discarded]) -> None:
    kept = "set back" if arguments.force else "kept"
    if arguments.json:
        slots = [
            {"device": each.uuid, "slot": each.slot, "rank": each.rank, "live": each.live,
             "result": kept if each.live else "removed"}
            for each in found
        ]  # fmt: skip
        print_json({"name": arguments.name, "slots": slots})
        return
    rows = [(each.uuid, str(each.slot), str(each.rank), kept if each.live else "removed") for each in found]
    print_table(("DEVICE", ">SLOT", ">RANK", "RESULT"), rows)
