"""What tools set, and waiting until it holds. The only other takers of the lock."""

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
from kvcached_core.ledger.snapshot import OwnerSnapshot, snapshot
from kvcached_core.units import Size

_POLL_SECONDS = 0.01


class Change(NamedTuple):
    """One slot whose control was set: it holds once `generation` is applied and nothing is above it."""

    folder: str
    uuid: str
    slot: int
    instance: str
    rank: int
    limit_bytes: int
    floor_bytes: int
    generation: int


class Outcome(NamedTuple):
    """How one change stands: acknowledged by the owner, and holding."""

    change: Change
    acknowledged: bool
    leased_bytes: int
    granule_bytes: int
    gone: bool  # the owner has ended or the slot is another's

    @property
    def holds(self) -> bool:
        """Say whether it is applied and nothing is above it but the one granule that is never let go (I7)."""
        most = max(self.change.limit_bytes, self.granule_bytes)
        return not self.gone and self.acknowledged and self.leased_bytes <= most


class NoSuchEngineError(LedgerError):
    """No living engine has this name. `names` are those there are."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        self.names = sorted(set(names))
        super().__init__(
            f"no engine is named {name}; there {'are ' + ', '.join(self.names) if names else 'is none'}"
        )


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
    """Set the floor likewise; raises CapacityError if the floors would no longer fit (I3)."""
    return _set(runtime, name, "floor", floor, devices)


def set_weight(
    runtime: Runtime, name: str, weight: int, devices: Iterable[str] | None = None
) -> list[Change]:
    """Set the weight likewise."""
    return _set(runtime, name, "weight", weight, devices)


def look(runtime: Runtime, changes: Iterable[Change], control: str = "limit") -> list[Outcome]:
    """Return how each change stands now."""
    owners = {(device.folder, owner.slot): owner for device in snapshot(runtime) for owner in device.owners}
    return [_judge(change, owners.get((change.folder, change.slot)), control) for change in changes]


def wait_until_holds(runtime: Runtime, changes: list[Change], timeout_seconds: float, control: str = "limit",
                     clock: Callable[[], float] = time.monotonic,
                     sleep: Callable[[float], None] = time.sleep) -> list[Outcome]:  # fmt: skip
    """Wait until every change holds, at most so long; returns how each stands then."""
    end = clock() + timeout_seconds
    while True:
        outcomes = look(runtime, changes, control)
        if all(outcome.holds or outcome.gone for outcome in outcomes) or clock() >= end:
            return outcomes
        sleep(_POLL_SECONDS)


def _judge(change: Change, owner: OwnerSnapshot | None, control: str) -> Outcome:
    if owner is None or not owner.live or (owner.heard and (owner.instance, owner.rank) != change[3:5]):
        return Outcome(change, False, 0, 0, gone=True)
    acknowledged = getattr(owner, f"{control}_applied_generation") >= change.generation
    leased_bytes = owner.leased_bytes if control == "limit" else 0
    return Outcome(change, acknowledged, leased_bytes, owner.granule_bytes, gone=False)


def _set(
    runtime: Runtime, name: str, control: str, value: Size | int, devices: Iterable[str] | None
) -> list[Change]:
    chosen = None if devices is None else set(devices)
    names: list[str] = []
    todo: list[tuple[DeviceFolder, LedgerFile, list[int], int]] = []
    with contextlib.ExitStack() as stack:
        for folder in runtime.devices():  # in one order: two tools cannot wait for each other
            file = stack.enter_context(locked(folder))
            if file is None or (chosen is not None and file.uuid not in chosen):
                continue
            sweep(folder, file)
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
            todo.append((folder, file, mine, wanted))
        changes = [
            _write(folder, file, slot, control, wanted)
            for folder, file, mine, wanted in todo
            for slot in mine
        ]
    for folder, _, mine, _ in todo:
        for slot in mine:
            ring(folder.worker_bell(slot))
            ring(folder.engine_bell(slot))
    if not changes:
        raise NoSuchEngineError(name, names)
    return changes


def _write(folder: DeviceFolder, file: LedgerFile, slot: int, control: str, value: int) -> Change:
    """Write a value, then its generation: an owner that sees the generation sees the value."""
    generation = file.get(slot, f"{control}_wanted_generation") + 1
    file.set(slot, f"{control}_wanted", value)
    file.set(slot, f"{control}_wanted_generation", generation)
    return Change(
        folder.path.name, file.uuid, slot, file.get_text(slot, "instance"), file.get(slot, "rank"),
        file.get(slot, "limit_wanted"), file.get(slot, "floor_wanted"), generation,
    )  # fmt: skip
