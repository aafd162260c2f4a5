"""`kvctl trim`: make an engine give back the memory that no request needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.tools.control import NoSuchEngineError
from kvcached_core.ledger.tools.trim import Trimmed, ask_to_trim, look_at_trims, wait_until_trimmed
from kvcached_core.units import format_size
from kvctl.devices import chosen_uuids
from kvctl.exit_codes import CommandError, ExitCode, no_such_engine
from kvctl.output import print_json, print_table


def run_trim(arguments: argparse.Namespace) -> ExitCode:
    """Ask every rank to give memory back, and wait until each has done so."""
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = chosen_uuids(runtime, arguments.device)
    try:
        trims = ask_to_trim(runtime, arguments.name, devices)
        if arguments.no_wait:
            outcomes = look_at_trims(runtime, trims)
        else:
            outcomes = wait_until_trimmed(runtime, arguments.name, trims, arguments.wait, devices)
    except NoSuchEngineError as error:
        raise no_such_engine(arguments.name, error.names) from None
    if arguments.json:
        print_json(_data(arguments.name, outcomes))
    else:
        rows = [
            (str(o.trim.rank), o.trim.uuid, format_size(o.trim.leased_bytes), format_size(o.leased_bytes),
             format_size(o.given_bytes), _state(o))
            for o in outcomes
        ]  # fmt: skip
        print_table((">RANK", "DEVICE", ">BEFORE", ">HELD", ">GIVEN BACK", "STATE"), rows)
    return _judge(arguments, outcomes)


def _state(outcome: Trimmed) -> str:
    if outcome.gone:
        return "ended"
    if outcome.holds:
        return "holds"
    return "asked" if outcome.trim.reclaimable else "cannot be asked"


def _judge(arguments: argparse.Namespace, outcomes: Sequence[Trimmed]) -> ExitCode:
    name = arguments.name
    if any(outcome.gone for outcome in outcomes):
        raise CommandError(ExitCode.FAILED, f"{name} ended in the meantime (see kvctl list)")
    late = [outcome for outcome in outcomes if not outcome.holds]
    if any(not outcome.trim.reclaimable for outcome in late):
        raise CommandError(
            ExitCode.FAILED,
            f"{name} runs a version of kvcached that cannot be asked to give memory back: lower its limit "
            f"instead (kvctl limit {name} SIZE)",
        )
    if not late or arguments.no_wait:
        return ExitCode.OK
    raise CommandError(
        ExitCode.TIMED_OUT,
        f"{name} has not given back all spare and cached memory after {arguments.wait:g} s: its process is "
        f"stopped, runs a long step, or is not woken. The request lapses within a second; kvctl list {name} "
        f"shows the memory it holds",
    )


def _data(name: str, outcomes: Sequence[Trimmed]) -> dict[str, Any]:
    ranks = [
        {
            "device": outcome.trim.uuid,
            "rank": outcome.trim.rank,
            "before_bytes": outcome.trim.leased_bytes,
            "asked_bytes": max(0, outcome.trim.leased_bytes - outcome.trim.target_bytes),
            "leased_bytes": outcome.leased_bytes,
            "given_bytes": outcome.given_bytes,
            "holds": outcome.holds,
        }
        for outcome in outcomes
    ]
    return {"name": name, "holds": all(outcome.holds for outcome in outcomes), "ranks": ranks}
