"""Discarding what an engine has left behind: the slots of the dead, and what tools have set for the living.

The slot of a living owner is never freed: it counts memory that is in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvcached_core.ledger.file.layout import FREE
from kvcached_core.ledger.file.locked import locked
from kvcached_core.ledger.file.runtime import Runtime


class Discarded(NamedTuple):
    """What became of one slot of the name: freed, or left to its living owner."""

    uuid: str
    slot: int
    rank: int
    live: bool


def discard(runtime: Runtime, name: str, devices: Iterable[str] | None = None) -> list[Discarded]:
    """Free the slots of this name whose owners are dead, and remove their files; a slot that lives stays.

    On all devices or on those with these UUIDs. Raises BusyError, LedgerError.
    """
    chosen = None if devices is None else set(devices)
    found: list[Discarded] = []
    for folder in runtime.devices():
        with locked(folder) as file:
            if file is None or (chosen is not None and file.uuid not in chosen):
                continue
            for slot in file.slots:
                if file.get(slot, "claim") == FREE or file.get_text(slot, "name") != name:
                    continue
                live = folder.alive(slot)
                found.append(Discarded(file.uuid, slot, file.get(slot, "rank"), live))
                if not live:
                    file.set(slot, "claim", FREE)  # its memory has gone with it
                    folder.remove(slot)
    return found
