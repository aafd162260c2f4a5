"""Wait until engines have done what a tool asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import OwnerSnapshot, snapshot

Owners = dict[tuple[str, int], OwnerSnapshot]  # by device folder and slot
_POLL_SECONDS = 0.01


class Asked(Protocol):
    """One slot of an engine that was asked for something."""

    @property
    def folder(self) -> str: ...
    @property
    def slot(self) -> int: ...
    @property
    def instance(self) -> str: ...
    @property
    def rank(self) -> int: ...


class Result(Protocol):
    """How far one rank has come."""

    @property
    def holds(self) -> bool: ...
    @property
    def gone(self) -> bool: ...


_Result = TypeVar("_Result", bound=Result)


def read_owners(runtime: Runtime) -> Owners:
    """Return all owners on all devices, as they are now."""
    return {(device.folder, owner.slot): owner for device in snapshot(runtime) for owner in device.owners}


def find_owner(owners: Owners, asked: Asked) -> OwnerSnapshot | None:
    """Return the owner that was asked; None if it has ended or the slot has another owner."""
    owner = owners.get((asked.folder, asked.slot))
    if owner is None or not owner.live:
        return None
    if owner.written and (owner.instance, owner.rank) != (asked.instance, asked.rank):
        return None
    return owner


def wait_until_done(
    look: Callable[[], list[_Result]],
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    ask_again: Callable[[], object] | None = None,
    again_seconds: float = 0.0,
) -> list[_Result]:
    """Look until every rank has done it or is gone, at most `timeout_seconds`; return the last results.

    Meanwhile `ask_again` is called every `again_seconds`.
    """
    end = clock() + timeout_seconds
    again = clock() + again_seconds
    while True:
        results = look()
        now = clock()
        if all(result.holds or result.gone for result in results) or now >= end:
            return results
        if ask_again is not None and now >= again:
            again = now + again_seconds
            ask_again()
        sleep(_POLL_SECONDS)
