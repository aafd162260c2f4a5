"""Trim an engine: ask it to give back all memory that no request needs.

A trim is a reclaim like those of engines: a target, no lower than the memory that requests need, which lapses
unless it is repeated. It never raises the target of another reclaim, and no request is preempted for it. The
next lease of any engine on the device overwrites it, so it is repeated until the engine has obeyed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvcached_core.events import Value, happened
from kvcached_core.ledger.file.doorbells import ring
from kvcached_core.ledger.file.layout import FIRST_CLAIM
from kvcached_core.ledger.file.locked import locked
from kvcached_core.ledger.file.runtime import DeviceFolder, Runtime
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.history import History
from kvcached_core.ledger.policy.arbiter import FRESH_MS, writes_minor_1
from kvcached_core.ledger.snapshot import OwnerSnapshot
from kvcached_core.ledger.tools.control import NoSuchEngineError
from kvcached_core.ledger.tools.waiting import find_owner, read_owners, wait_until_done

TAKER = "kvctl trim"  # the `taker` of the event, in the history
_AGAIN_SECONDS = 0.25


class Trim(NamedTuple):
    """One rank that was asked to come down to `target_bytes`.

    It has obeyed once it holds no more, or once it has released as much as it held above the target: a rank
    with requests takes new memory at once.
    """

    folder: str
    uuid: str
    slot: int
    instance: str
    rank: int
    leased_bytes: int  # when it was asked
    target_bytes: int
    released_granules: int  # since the engine began, when it was asked
    reclaimable: bool  # False: its version cannot be asked to give back


class Trimmed(NamedTuple):
    """How far one rank has come."""

    trim: Trim
    leased_bytes: int
    given_bytes: int
    gone: bool

    @property
    def holds(self) -> bool:
        """Whether the rank has obeyed."""
        trim = self.trim
        asked = max(0, trim.leased_bytes - trim.target_bytes)
        obeyed = self.leased_bytes <= trim.target_bytes or self.given_bytes >= asked
        return not self.gone and (asked == 0 or obeyed)


def ask_to_trim(runtime: Runtime, name: str, devices: Iterable[str] | None = None) -> list[Trim]:
    """Ask every rank of the engine to trim, on all devices or on those with these UUIDs.

    Raises NoSuchEngineError, BusyError, LedgerError.
    """
    chosen = None if devices is None else set(devices)
    asked: list[Trim] = []
    names: list[str] = []
    for folder in runtime.devices():
        with locked(folder) as file:
            if file is None or (chosen is not None and file.uuid not in chosen):
                continue
            living = [s for s in file.slots if file.get(s, "claim") >= FIRST_CLAIM and folder.alive(s)]
            names += [file.get_text(slot, "name") for slot in living]
            mine = [slot for slot in living if file.get_text(slot, "name") == name]
            asked += [_ask(folder, file, slot) for slot in mine]
        for slot in mine:
            ring(folder.engine_bell(slot))
    if not asked:
        raise NoSuchEngineError(name, names)
    return asked


def wait_until_trimmed(runtime: Runtime, name: str, trims: list[Trim], timeout_seconds: float,
                       devices: Iterable[str] | None = None,
                       clock: Callable[[], float] = time.monotonic,
                       sleep: Callable[[float], None] = time.sleep) -> list[Trimmed]:  # fmt: skip
    """Wait until each rank has obeyed, at most `timeout_seconds`, and ask again meanwhile.

    Returns how far each has come.
    """
    return wait_until_done(
        lambda: look_at_trims(runtime, trims), timeout_seconds, clock, sleep,
        lambda: ask_to_trim(runtime, name, devices), _AGAIN_SECONDS,
    )  # fmt: skip


def look_at_trims(runtime: Runtime, trims: Iterable[Trim]) -> list[Trimmed]:
    """Return how far each rank has come."""
    owners = read_owners(runtime)
    return [_judge(trim, find_owner(owners, trim)) for trim in trims]


def _judge(trim: Trim, owner: OwnerSnapshot | None) -> Trimmed:
    if owner is None:
        return Trimmed(trim, 0, 0, gone=True)
    given = (owner.released_granules - trim.released_granules) * owner.granule_bytes
    return Trimmed(trim, owner.leased_bytes, given, gone=False)


def _ask(folder: DeviceFolder, file: LedgerFile, slot: int) -> Trim:
    """Write the target into a slot, unless it holds no more or has a lower target; the lock is held."""
    row = file.rows()[slot]
    granule, leased, reclaimable = max(1, row["granule_bytes"]), row["leased_bytes"], writes_minor_1(row)
    # The granule with block 0 stays (I7). If needed_bytes is not reported, all it wants counts as needed.
    needed = row["needed_bytes"] or max(row["used_bytes"], row["wanted_bytes"])
    wanted = max(granule, -(-needed // granule) * granule)
    trim = Trim(
        folder.path.name, file.uuid, slot, file.get_text(slot, "instance"), row["rank"],
        leased, wanted, row["released_granules"], reclaimable,
    )  # fmt: skip
    if leased > wanted and reclaimable:
        _write_target(folder, file, slot, row, wanted)
    return trim


def _write_target(folder: DeviceFolder, file: LedgerFile, slot: int, row: Row, wanted: int) -> None:
    leased, now_ms = row["leased_bytes"], time.monotonic_ns() // 1_000_000
    stands = now_ms < row["asked_until_ms"]
    before = row["target_bytes"] if stands else 0
    target = min(wanted, before or wanted)
    if not before:
        file.set(slot, "asked_since_ms", now_ms)
    if not stands:
        file.set(slot, "must_bytes", 0)
    file.set(slot, "target_bytes", target)
    file.set(slot, "reclaim_bytes", leased - target)
    file.set(slot, "asked_until_ms", now_ms + FRESH_MS)
    if not before:
        file.set(slot, "reclaims", row["reclaims"] + 1)
        data: dict[str, Value] = {
            "device": folder.path.name, "name": file.get_text(slot, "name"), "slot": slot,
            "target_bytes": target, "must_bytes": 0, "leased_bytes": leased, "taker": TAKER,
        }  # fmt: skip
        history = History(folder)
        history.put_aside()
        history.append(happened("reclaim", data))
