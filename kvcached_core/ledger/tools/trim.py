"""Trimming: a tool asks an engine to give back what no request needs, in the words in which engines ask.

A trim is an ask like any other: a target above all that requests need, which lapses unless it is asked again.
It never raises what somebody else has asked, and preempts nobody. The next lease of anybody on the device
writes its own asks over it; then it is asked again until it was obeyed.
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
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.ledger.history import History
from kvcached_core.ledger.policy.arbiter import FRESH_MS, writes_minor_1
from kvcached_core.ledger.snapshot import OwnerSnapshot, snapshot
from kvcached_core.ledger.tools.control import NoSuchEngineError

TAKER = "kvctl trim"  # who asks, in the history
_POLL_SECONDS = 0.01
_AGAIN_SECONDS = 0.25


class Trim(NamedTuple):
    """One rank that was asked: it obeyed once it holds no more than `line_bytes`, or has since released as
    much as it then held above it (who serves takes new memory at once)."""

    folder: str
    uuid: str
    slot: int
    instance: str
    rank: int
    leased_bytes: int  # before
    line_bytes: int
    released_granules: int  # ever, before
    hears: bool  # False: it runs a version that is never asked


class Trimmed(NamedTuple):
    """How one trim stands."""

    trim: Trim
    leased_bytes: int
    given_bytes: int
    gone: bool

    @property
    def holds(self) -> bool:
        """Say whether it was obeyed."""
        trim = self.trim
        asked = max(0, trim.leased_bytes - trim.line_bytes)
        obeyed = self.leased_bytes <= trim.line_bytes or self.given_bytes >= asked
        return not self.gone and (asked == 0 or obeyed)


def ask_to_trim(runtime: Runtime, name: str, devices: Iterable[str] | None = None) -> list[Trim]:
    """Ask every rank of the engine, on all devices or on those with these UUIDs.

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
    """Wait until each has obeyed, at most so long, asking again meanwhile; returns how each stands then."""
    end = clock() + timeout_seconds
    again = clock() + _AGAIN_SECONDS
    while True:
        outcomes = look_at_trims(runtime, trims)
        now = clock()
        if all(outcome.holds or outcome.gone for outcome in outcomes) or now >= end:
            return outcomes
        if now >= again:
            again = now + _AGAIN_SECONDS
            ask_to_trim(runtime, name, devices)
        sleep(_POLL_SECONDS)


def look_at_trims(runtime: Runtime, trims: Iterable[Trim]) -> list[Trimmed]:
    """Return how each stands now."""
    owners = {(device.folder, owner.slot): owner for device in snapshot(runtime) for owner in device.owners}
    return [_judge(trim, owners.get((trim.folder, trim.slot))) for trim in trims]


def _judge(trim: Trim, owner: OwnerSnapshot | None) -> Trimmed:
    if owner is None or not owner.live or (owner.heard and (owner.instance, owner.rank) != trim[3:5]):
        return Trimmed(trim, 0, 0, gone=True)
    given = (owner.released_granules - trim.released_granules) * owner.granule_bytes
    return Trimmed(trim, owner.leased_bytes, given, gone=False)


def _ask(folder: DeviceFolder, file: LedgerFile, slot: int) -> Trim:
    """Write the ask into a slot, unless there is nothing to give or more is asked already; locked."""
    row = file.rows()[slot]
    granule, leased, hears = max(1, row["granule_bytes"]), row["leased_bytes"], writes_minor_1(row)
    # The granule with block 0 stays (I7); whose scheduler has not said what requests need may need it all.
    needed = row["needed_bytes"] or max(row["used_bytes"], row["wanted_bytes"])
    line = max(granule, -(-needed // granule) * granule)
    trim = Trim(
        folder.path.name, file.uuid, slot, file.get_text(slot, "instance"), row["rank"],
        leased, line, row["released_granules"], hears,
    )  # fmt: skip
    if leased <= line or not hears:
        return trim
    now_ms = time.monotonic_ns() // 1_000_000
    stands = now_ms < row["asked_until_ms"]
    before = row["target_bytes"] if stands else 0
    target = min(line, before or line)
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
    return trim
