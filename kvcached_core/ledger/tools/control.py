"""Set the limit, floor or weight of an engine, and wait until the engine has applied it.

Apart from workers, only tools take a ledger's lock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.doorbells import ring
from kvcached_core.ledger.file.layout import FIRST_CLAIM
from kvcached_core.ledger.file.locked import locked
from kvcached_core.ledger.file.runtime import DeviceFolder, Runtime
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.ledger.owned_slot import sweep
from kvcached_core.ledger.policy import grant
from kvcached_core.ledger.snapshot import OwnerSnapshot
from kvcached_core.ledger.tools.waiting import find_owner, read_owners, wait_until_done
from kvcached_core.units import Size


class Change(NamedTuple):
    """One slot whose limit, floor or weight was set; `generation` is the number that acknowledges it."""

    folder: str
    uuid: str
    slot: int
    instance: str
    rank: int
    limit_bytes: int
    floor_bytes: int
    generation: int


class Outcome(NamedTuple):
    """How far the worker of one changed slot has come."""

    change: Change
    acknowledged: bool
    leased_bytes: int
    granule_bytes: int
    gone: bool  # the worker has ended, or the slot has another owner

    @property
    def holds(self) -> bool:
        """Whether the change is applied and the rank is within its limit, or holds only granule 0 (I7)."""
        most = max(self.change.limit_bytes, self.granule_bytes)
        return not self.gone and self.acknowledged and self.leased_bytes <= most


class NoSuchEngineError(LedgerError):
    """No living engine has this name. `names` are those of the living engines."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        self.names = sorted(set(names))
        others = f"there are {', '.join(self.names)}" if self.names else "none is running"
        super().__init__(f"no engine is named {name}: {others}")


def set_limit(
    runtime: Runtime, name: str, limit: Size | int, devices: Iterable[str] | None = None
) -> list[Change]:
    """Set the limit of every rank of the engine, on all devices or on those with these UUIDs.

    A percentage is of the device's capacity. Raises NoSuchEngineError, BusyError, LedgerError.
    """
    return _set(runtime, name, "limit", limit, devices)


def set_floor(
    runtime: Runtime, name: str, floor: Size | int, devices: Iterable[str] | None = None
) -> list[Change]:
    """Set the floor in the same way; raises CapacityError if the floors would no longer fit (I3)."""
    return _set(runtime, name, "floor", floor, devices)


def set_weight(
    runtime: Runtime, name: str, weight: int, devices: Iterable[str] | None = None
) -> list[Change]:
    """Set the weight in the same way."""
    return _set(runtime, name, "weight", weight, devices)


def look(runtime: Runtime, changes: Iterable[Change], control: str = "limit") -> list[Outcome]:
    """Return how far the worker of each changed slot has come."""
    owners = read_owners(runtime)
    return [_judge(change, find_owner(owners, change), control) for change in changes]


def wait_until_holds(runtime: Runtime, changes: list[Change], timeout_seconds: float, control: str = "limit",
                     clock: Callable[[], float] = time.monotonic,
                     sleep: Callable[[float], None] = time.sleep) -> list[Outcome]:  # fmt: skip
    """Wait until every change holds, at most `timeout_seconds`; return the last outcomes."""
    return wait_until_done(lambda: look(runtime, changes, control), timeout_seconds, clock, sleep)


def _judge(change: Change, owner: OwnerSnapshot | None, control: str) -> Outcome:
    if owner is None:
        return Outcome(change, False, 0, 0, gone=True)
    acknowledged = getattr(owner, f"{control}_applied_generation") >= change.generation
    leased_bytes = owner.leased_bytes if control == "limit" else 0
    return Outcome(change, acknowledged, leased_bytes, owner.granule_bytes, gone=False)


class _Todo(NamedTuple):
    """The slots of one device to write `value` into."""

    folder: DeviceFolder
    file: LedgerFile
    slots: list[int]
    value: int


def _set(
    runtime: Runtime, name: str, control: str, value: Size | int, devices: Iterable[str] | None
) -> list[Change]:
    chosen = None if devices is None else set(devices)
    names: list[str] = []
    todo: list[_Todo] = []
    with contextlib.ExitStack() as stack:
        for folder in runtime.devices():  # in one order: two tools cannot wait for each other
            file = stack.enter_context(locked(folder))
            if file is None or (chosen is not None and file.uuid not in chosen):
                continue
            sweep(folder, file)
            todo.append(_prepare(folder, file, name, control, value, names))
        changes = [
            _write(each.folder, each.file, slot, control, each.value) for each in todo for slot in each.slots
        ]
    for each in todo:
        for slot in each.slots:
            ring(each.folder.worker_bell(slot))
            ring(each.folder.engine_bell(slot))
    if not changes:
        raise NoSuchEngineError(name, names)
    return changes


def _prepare(folder: DeviceFolder, file: LedgerFile, name: str, control: str, value: Size | int,
             names: list[str]) -> _Todo:  # fmt: skip
    """Find the engine's slots on a device, and check floors; adds the names of all engines to `names`."""
    rows = {slot: row for slot, row in file.rows().items() if row["claim"] >= FIRST_CLAIM}
    names += [file.get_text(slot, "name") for slot in rows]
    mine = [slot for slot in rows if file.get_text(slot, "name") == name]
    capacity = file.header.capacity_bytes
    wanted = value.of(capacity) if isinstance(value, Size) else value
    if control == "limit":
        wanted = min(wanted, capacity)
    if control == "floor" and mine:
        others = [row for slot, row in rows.items() if slot not in mine]
        grant.check_floors(others, [wanted] * len(mine), capacity, file.uuid)
    return _Todo(folder, file, mine, wanted)


def _write(folder: DeviceFolder, file: LedgerFile, slot: int, control: str, value: int) -> Change:
    """Write a value, then its generation: an owner that sees the generation sees the value."""
    generation = file.get(slot, f"{control}_wanted_generation") + 1
    file.set(slot, f"{control}_wanted", value)
    file.set(slot, f"{control}_wanted_generation", generation)
    return Change(
        folder.path.name, file.uuid, slot, file.get_text(slot, "instance"), file.get(slot, "rank"),
        file.get(slot, "limit_wanted"), file.get(slot, "floor_wanted"), generation,
    )  # fmt: skip
