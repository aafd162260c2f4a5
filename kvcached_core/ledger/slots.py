"""The slots of an engine's ranks, as its scheduler reads and writes them."""

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
    """The geometry that one rank has described; sizes are bytes of that rank."""

    page_bytes: int
    granule_bytes: int
    granule_count: int
    blocks_per_granule: int
    block_count: int
    stride_bytes: int

    @property
    def block_bytes(self) -> int:
        """Size of one block in all segments."""
        return self.stride_bytes * (self.granule_bytes // self.page_bytes) if self.page_bytes else 0


class Bell(Protocol):
    """A doorbell that the scheduler can ring."""

    def ring(self) -> None: ...
    def close(self) -> None: ...


class Slot(ABC):
    """The words of one rank, with the index of each computed once.

    A LocalSlot's words are in a ledger of this machine. A RemoteSlot keeps a copy of the words of a rank on
    another node.
    """

    bell_fd: int
    ringer: Bell

    def __init__(self, words: memoryview, base: int, rank: int, geometry: SlotGeometry) -> None:
        """`words` are 8 bytes each; the first word of the slot is at index `base`."""
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
        """Write the value of a field."""

    @abstractmethod
    def is_there(self) -> bool:
        """Return whether the words may be read and still belong to the rank that claimed them."""

    @abstractmethod
    def close(self, keep_bell: bool = False) -> None:
        """Close the files; with `keep_bell` all but the scheduler's doorbell."""


class LocalSlot(Slot):
    """One rank's slot in a ledger of this machine."""

    def __init__(self, folder: DeviceFolder, index: int) -> None:
        """Map the ledger and open the doorbell of slot number `index`. Raises OSError, LedgerError."""
        self.bell_fd = open_bell(folder.engine_bell(index))
        try:
            self.file = file = LedgerFile(folder.ledger)
        except BaseException:
            close_private(self.bell_fd)
            raise
        geometry = SlotGeometry(*(file.get(index, name) for name in SlotGeometry._fields))
        super().__init__(file.words, file.at(index, "claim"), file.get(index, "rank"), geometry)
        self.claim_at = self.at["claim"]
        self.claim = file.words[self.claim_at]
        self.ringer = Ringer(folder.worker_bell(index))
        name = file.get_text(index, "name")
        self.reporter = Reporter(folder, lambda: name, lambda: index)

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


def find_slots(
    runtime: Runtime, instance: str, ranks: set[int], may_miss: Set[int] = frozenset()
) -> dict[int, LocalSlot]:
    """Return the slots of these ranks, by rank.

    Raises LedgerError naming the ranks that were not found, except those in `may_miss`.
    """
    found: dict[int, LocalSlot] = {}
    for folder in runtime.devices():
        for index, rank in _owned_by(folder, instance):
            if rank in ranks and rank not in found:
                with contextlib.suppress(OSError, LedgerError):  # its worker has ended meanwhile
                    found[rank] = LocalSlot(folder, index)
    missing = sorted(ranks - found.keys() - may_miss)
    if missing:
        for slot in found.values():
            slot.close()
        raise LedgerError(
            f"no living worker of instance {instance} with rank {', '.join(map(str, missing))} in the "
            f"ledgers under {runtime.path}: it has ended, or works with another runtime directory "
            f"(see kvctl doctor)"
        )
    return found


def replace_moved_slots(runtime: Runtime, instance: str, slots: list[Slot]) -> list[LocalSlot]:
    """Find the slots that workers on this machine had to write again elsewhere; return the new ones.

    Each replaces the old one in `slots` and keeps its doorbell's descriptor. A ledger file that was cut is
    made anew by its workers: they are rung, and their slots stay as they are until then.
    Raises LedgerError if a slot is gone.
    """
    lost = {
        slot.rank: (position, slot)
        for position, slot in enumerate(slots)
        if isinstance(slot, LocalSlot) and not slot.is_there()
    }
    cut = {rank for rank, (_, slot) in lost.items() if not slot.file.is_whole()}
    found = find_slots(runtime, instance, set(lost), may_miss=cut)
    for rank, slot in found.items():
        position, old = lost[rank]
        os.dup2(slot.bell_fd, old.bell_fd, inheritable=False)  # pollers keep the number of the descriptor
        close_private(slot.bell_fd)
        slot.bell_fd = old.bell_fd
        old.close(keep_bell=True)
        slots[position] = slot
    for rank in lost.keys() - found.keys():
        lost[rank][1].ringer.ring()
    return list(found.values())


def _owned_by(folder: DeviceFolder, instance: str) -> list[tuple[int, int]]:
    """Return the slot number and the rank of every living worker of this instance on a device."""
    try:
        file = LedgerFile(folder.ledger)
    except (OSError, LedgerError):
        return []
    with contextlib.closing(file):
        claimed = [index for index, claim in enumerate(file.claims()) if claim >= FIRST_CLAIM]
        owned = [index for index in claimed if file.get_text(index, "instance") == instance]
        return [(index, file.get(index, "rank")) for index in owned if folder.alive(index)]
