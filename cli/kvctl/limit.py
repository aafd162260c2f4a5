"""`kvctl limit` and `kvctl limit-percent`: set a limit and wait until it holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kvcached_core.ledger.control import Change, NoSuchEngineError, Outcome, look, set_limit, wait_until_holds
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot
from kvcached_core.units import format_size
from kvctl.codes import Code, Failure, no_such_engine
from kvctl.devices import choose_devices
from kvctl.output import print_json, print_table, say


def run_limit(arguments: argparse.Namespace) -> Code:
    """Set the limit of every rank of an engine; each rank may hold that much of its device."""
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = None
    if arguments.device is not None:
        devices = [device.uuid for device in choose_devices(snapshot(runtime), arguments.device)]
    try:
        changes = set_limit(runtime, arguments.name, arguments.size, devices)
    except NoSuchEngineError as error:
        raise no_such_engine(arguments.name, error.names) from None
    _note_floors(changes)
    if arguments.no_wait:
        outcomes = look(runtime, changes)
    else:
        outcomes = wait_until_holds(runtime, changes, arguments.wait)
    if arguments.json:
        print_json(_data(arguments.name, outcomes))
    else:
        print_table((">RANK", "DEVICE", ">LIMIT", ">HELD", "STATE"), [_row(outcome) for outcome in outcomes])
    return _judge(arguments, outcomes)


def _note_floors(changes: Sequence[Change]) -> None:
    for change in changes:
        if change.limit_bytes < change.floor_bytes:
            say(
                f"the limit of rank {change.rank} is below its floor of {format_size(change.floor_bytes)}: "
                f"as long as that is so, its floor is the limit, {format_size(change.limit_bytes)}"
            )


def _judge(arguments: argparse.Namespace, outcomes: Sequence[Outcome]) -> Code:
    if any(outcome.gone for outcome in outcomes):
        raise Failure(Code.FAILED, f"{arguments.name} ended meanwhile (see kvctl list)")
    late = [outcome for outcome in outcomes if not outcome.holds]
    if not late or arguments.no_wait:
        return Code.OK
    deaf = sum(not outcome.acknowledged for outcome in late)
    why = (
        f"{deaf} of {len(outcomes)} ranks have not acknowledged it, so their process is stopped or stuck"
        if deaf
        else "it is acknowledged, and requests still use more: it holds when they have ended"
    )
    raise Failure(
        Code.TIMED_OUT,
        f"the limit of {arguments.name} does not hold after {arguments.wait:g} s: {why}. It stays set; "
        f"kvctl list {arguments.name} shows how it goes on",
    )


def _state(outcome: Outcome) -> str:
    if outcome.gone:
        return "ended"
    if not outcome.acknowledged:
        return "not acknowledged"
    return "holds" if outcome.holds else "acknowledged, still above"


def _row(outcome: Outcome) -> tuple[str, ...]:
    change = outcome.change
    sizes = (format_size(change.limit_bytes), format_size(outcome.leased_bytes))
    return (str(change.rank), change.uuid, *sizes, _state(outcome))


def _data(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ranks = [
        {
            "device": outcome.change.uuid,
            "rank": outcome.change.rank,
            "limit_bytes": outcome.change.limit_bytes,
            "floor_bytes": outcome.change.floor_bytes,
            "leased_bytes": outcome.leased_bytes,
            "generation": outcome.change.generation,
            "acknowledged": outcome.acknowledged,
            "holds": outcome.holds,
        }
        for outcome in outcomes
    ]
    return {"name": name, "holds": all(outcome.holds for outcome in outcomes), "ranks": ranks}
