"""`kvctl delete`: remove what an ended engine has left, or set back what was set for a living one."""

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

_WEIGHT = 100  # of an engine for which none was set


def run_delete(arguments: argparse.Namespace) -> ExitCode:
    """Free the slots of the dead; what lives is refused, or with --force loses its limit and weight."""
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = chosen_uuids(runtime, arguments.device)
    found = discard(runtime, arguments.name, devices)
    living = [each for each in found if each.live]
    if not found:
        there = snapshot(runtime)
        raise no_such_engine(arguments.name, (owner.name for device in there for owner in device.owners))
    if living and arguments.force:
        set_limit(runtime, arguments.name, Size(percent=100.0), devices)
        set_weight(runtime, arguments.name, _WEIGHT, devices)
    _tell(arguments, found)
    if living and not arguments.force:
        raise CommandError(
            ExitCode.FAILED,
            f"{arguments.name} is running: its slot counts memory in use and stays. End it first, or set its "
            f"limit and weight back with kvctl delete --force {arguments.name}",
        )
    return ExitCode.OK


def _tell(arguments: argparse.Namespace, found: Sequence[Discarded]) -> None:
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
