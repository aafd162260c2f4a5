"""Where a scheduler finds its workers' slots, and their words."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Set
from typing import NamedTuple, Protocol

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.descriptors import close_private
from kvcached_core.ledger.file.doorbells import Ringer, open_bell
from kvcached_core.ledger.file.layout import FIRST_CLAIM, SLOT_AT
from kvcached_core.ledger.file.runtime import DeviceFolder, Runtime
from kvcached_core.ledger.file.storage import LedgerFile, write_point
from kvcached_core.ledger.history import Reporter


class SlotGeometry(NamedTuple):
    """The geometry one rank has described; bytes are of that rank."""

    page_bytes: int
    granule_bytes: int
    granule_count: int
    blocks_per_granule: int
    block_count: int
    stride_bytes: int

    @property
    def block_bytes(self) -> int:
        """One block in all segments."""
        return self.stride_bytes * (self.granule_bytes // self.page_bytes) if self.page_bytes else 0


class Bell(Protocol):
    """What a worker's doorbell offers."""

    def ring(self) -> None: ...
    def close(self) -> None: ...


class Slot(ABC):
    """One rank's words, with their indices worked out. Here they are a ledger's (Place); of a rank on another
    node they are what was heard of them (Mirror)."""

    bell_fd: int
    ringer: Bell

    def __init__(self, words: memoryview, base: int, rank: int, geometry: SlotGeometry) -> None:
        """`words` are 8 bytes each; the slot's begin at index `base`."""
        self.words = words
        self.rank = rank
        self.geometry = geometry
        self.granule_bytes = max(1, geometry.granule_bytes)
        self.at = {name: base + offset for name, offset in SLOT_AT.items()}
        self.created_at, self.released_at = self.at["created_granules"], self.at["released_granules"]
        self.most_at = self.at["created_most"]
        self.demand_at, self.coming_at = self.at["demand_bytes"], self.at["coming_bytes"]
        self.target_at, self.must_at = self.at["target_bytes"], self.at["must_bytes"]
        self.asked_until_at = self.at["asked_until_ms"]
        self.wanted_at, self.applied_at = self.at["limit_wanted"], self.at["limit_applied"]

    @abstractmethod
    def set(self, name: str, value: int) -> None:
        """Write a word."""

    @abstractmethod
    def is_there(self) -> bool:
        """Say whether the words may be read and are still those of this claim."""

    @abstractmethod
    def close(self, keep_bell: bool = False) -> None:
        """Let go of what was opened."""


class LocalSlot(Slot):
    """One rank's slot in a ledger of this machine."""

    def __init__(self, folder: DeviceFolder, slot: int) -> None:
        """Map the ledger and open the bell. Raises OSError, LedgerError."""
        self.bell_fd = open_bell(folder.engine_bell(slot))
        try:
            self.file = file = LedgerFile(folder.ledger)
        except BaseException:
            close_private(self.bell_fd)
            raise
        geometry = SlotGeometry(*(file.get(slot, name) for name in SlotGeometry._fields))
        super().__init__(file.words, file.at(slot, "claim"), file.get(slot, "rank"), geometry)
        self.claim_at = self.at["claim"]
        self.claim = file.words[self.claim_at]
        self.ringer = Ringer(folder.worker_bell(slot))
        name = file.get_text(slot, "name")
        self.reporter = Reporter(folder, lambda: name, lambda: slot)

    def set(self, name: str, value: int) -> None:
        write_point(name)
        self.words[self.at[name]] = value

    def is_there(self) -> bool:
        return self.file.is_whole() and self.words[self.claim_at] == self.claim

    def close(self, keep_bell: bool = False) -> None:
        self.ringer.close()
        if not keep_bell:
            close_private(self.bell_fd)
        self.file.close()


def find_places(
    runtime: Runtime, instance: str, ranks: set[int], may_miss: Set[int] = frozenset()
) -> dict[int, LocalSlot]:
    """Return the places of these ranks; raises LedgerError naming those that are missing and may not."""
    found: dict[int, LocalSlot] = {}
    for folder in runtime.devices():
        for slot, rank in _slots_of(folder, instance):
            if rank in ranks and rank not in found:
                with contextlib.suppress(OSError, LedgerError):  # went away since
                    found[rank] = LocalSlot(folder, slot)
    missing = sorted(ranks - found.keys() - may_miss)
    if missing:
        for place in found.values():
            place.close()
        raise LedgerError(
            f"no living worker of instance {instance} with rank {', '.join(map(str, missing))} in the "
            f"ledgers under {runtime.path}: it has ended, or works with another runtime directory "
            f"(see kvctl doctor)"
        )
    return found


def find_again(runtime: Runtime, instance: str, slots: list[Slot]) -> list[LocalSlot]:
    """Put into `slots` what workers here had to write elsewhere, with the same bells; return what was put.

    A file that was cut is its workers' to make again: they are rung, and their places stay as they are.
    Raises LedgerError if a slot is gone.
    """
    lost = {
        place.rank: (at, place)
        for at, place in enumerate(slots)
        if isinstance(place, LocalSlot) and not place.is_there()
    }
    cut = {rank for rank, (_, place) in lost.items() if not place.file.is_whole()}
    found = find_places(runtime, instance, set(lost), may_miss=cut)
    for rank, place in found.items():
        at, before = lost[rank]
        os.dup2(place.bell_fd, before.bell_fd, inheritable=False)  # pollers keep their number
        close_private(place.bell_fd)
        place.bell_fd = before.bell_fd
        before.close(keep_bell=True)
        slots[at] = place
    for rank in lost.keys() - found.keys():
        lost[rank][1].ringer.ring()
    return list(found.values())


def _slots_of(folder: DeviceFolder, instance: str) -> list[tuple[int, int]]:
    """Return slot and rank of every living owner of this instance on a device."""
    try:
        file = LedgerFile(folder.ledger)
    except (OSError, LedgerError):
        return []
    with contextlib.closing(file):
        taken = [slot for slot, claim in enumerate(file.claims()) if claim >= FIRST_CLAIM]
        mine = [slot for slot in taken if file.get_text(slot, "instance") == instance]
        return [(slot, file.get(slot, "rank")) for slot in mine if folder.alive(slot)]
