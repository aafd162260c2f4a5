"""Discard the slots that dead engines have left, with the limits, floors and weights set in them.

The slot of a living worker is never freed: it counts memory that is in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvcached_core.ledger.file.layout import FREE
from kvcached_core.ledger.file.locked import locked
from kvcached_core.ledger.file.runtime import Runtime


class Discarded(NamedTuple):
    """One slot with the name: freed, or left to its living owner if `live`."""

    uuid: str
    slot: int
    rank: int
    live: bool


def discard(runtime: Runtime, name: str, devices: Iterable[str] | None = None) -> list[Discarded]:
    """Free the slots with this name whose owners are dead, and remove their files.

    On all devices or on those with these UUIDs. Returns also the slots of living owners. Raises BusyError,
    LedgerError.
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
                    file.set(slot, "claim", FREE)  # its memory was freed when it died
                    folder.remove(slot)
    return found
