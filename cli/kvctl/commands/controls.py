"""`kvctl limit`, `limit-percent`, `floor`, `weight`: set a control on every rank, wait until it holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvcached_core.errors import CapacityError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.tools.control import (
    Change,
    NoSuchEngineError,
    Outcome,
    look,
    set_floor,
    set_limit,
    set_weight,
    wait_until_holds,
)
from kvcached_core.units import format_size
from kvctl.devices import chosen_uuids
from kvctl.exit_codes import CommandError, ExitCode, no_such_engine
from kvctl.output import print_json, print_table, say


class Control(NamedTuple):
    """A control. `show` and `data` return the outcome on one rank, as table cells and as JSON."""

    name: str
    set: Callable[..., list[Change]]
    show: Callable[[Outcome], dict[str, str]]  # table cells by column title
    data: Callable[[Outcome], dict[str, int]]


def run_limit(arguments: argparse.Namespace) -> ExitCode:
    """Set the limit: the most memory that each rank may hold on its device."""

    def show(outcome: Outcome) -> dict[str, str]:
        return {">LIMIT": format_size(outcome.change.limit_bytes), ">HELD": format_size(outcome.leased_bytes)}

    return _run(
        arguments, Control("limit", set_limit, show, lambda outcome: {"leased_bytes": outcome.leased_bytes})
    )


def run_floor(arguments: argparse.Namespace) -> ExitCode:
    """Set the floor: the memory that each rank can always get back."""

    def show(outcome: Outcome) -> dict[str, str]:
        return {">FLOOR": format_size(outcome.change.floor_bytes)}

    return _run(arguments, Control("floor", set_floor, show, lambda outcome: {}))


def run_weight(arguments: argparse.Namespace) -> ExitCode:
    """Set the weight: the engine's share of memory when demand exceeds the device."""
    weight: int = arguments.value
    control = Control(
        "weight", set_weight, lambda outcome: {">WEIGHT": str(weight)}, lambda outcome: {"weight": weight}
    )
    return _run(arguments, control)


def _run(arguments: argparse.Namespace, control: Control) -> ExitCode:
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = chosen_uuids(runtime, arguments.device)
    try:
        changes = control.set(runtime, arguments.name, arguments.value, devices)
    except NoSuchEngineError as error:
        raise no_such_engine(arguments.name, error.names) from None
    except CapacityError as error:
        raise CommandError(
            ExitCode.FAILED, f"{error}, or lower another engine's floor first (kvctl list shows all floors)"
        ) from None
    if control.name != "weight":
        _note_floors(changes)
    if arguments.no_wait:
        outcomes = look(runtime, changes, control.name)
    else:
        outcomes = wait_until_holds(runtime, changes, arguments.wait, control.name)
    if arguments.json:
        print_json(_data(arguments.name, control, outcomes))
    else:
        _print(control, outcomes)
    return _judge(arguments, control, outcomes)


def _note_floors(changes: Sequence[Change]) -> None:
    for change in changes:
        if change.limit_bytes < change.floor_bytes:
            say(
                f"the limit of rank {change.rank} is below its floor of {format_size(change.floor_bytes)}: "
                f"until that changes, its floor is the limit, {format_size(change.limit_bytes)}"
            )


def _judge(arguments: argparse.Namespace, control: Control, outcomes: Sequence[Outcome]) -> ExitCode:
    if any(outcome.gone for outcome in outcomes):
        raise CommandError(ExitCode.FAILED, f"{arguments.name} ended in the meantime (see kvctl list)")
    late = [outcome for outcome in outcomes if not outcome.holds]
    if not late or arguments.no_wait:
        return ExitCode.OK
    silent = sum(not outcome.acknowledged for outcome in late)
    why = (
        f"{silent} of {len(outcomes)} ranks have not acknowledged it, as their process is stopped or stuck"
        if silent
        else "all ranks have acknowledged it, but requests still use more; the engine shrinks as they end"
    )
    raise CommandError(
        ExitCode.TIMED_OUT,
        f"the {control.name} of {arguments.name} does not hold after {arguments.wait:g} s: {why}. The "
        f"{control.name} stays set; kvctl list {arguments.name} shows the progress",
    )


def _state(outcome: Outcome) -> str:
    if outcome.gone:
        return "ended"
    if not outcome.acknowledged:
        return "not acknowledged"
    return "holds" if outcome.holds else "acknowledged, over limit"


def _print(control: Control, outcomes: Sequence[Outcome]) -> None:
    rows = [
        {
            ">RANK": str(outcome.change.rank),
            "DEVICE": outcome.change.uuid,
            **control.show(outcome),
            "STATE": _state(outcome),
        }
        for outcome in outcomes
    ]
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def _data(name: str, control: Control, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ranks = [
        {
            "device": outcome.change.uuid,
            "rank": outcome.change.rank,
            "limit_bytes": outcome.change.limit_bytes,
            "floor_bytes": outcome.change.floor_bytes,
            **control.data(outcome),
            "generation": outcome.change.generation,
            "acknowledged": outcome.acknowledged,
            "holds": outcome.holds,
        }
        for outcome in outcomes
    ]
    return {"name": name, "holds": all(outcome.holds for outcome in outcomes), "ranks": ranks}
