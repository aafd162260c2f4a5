"""What the supply of pages asks of the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvcached_core.driver.base import MemoryInfo


class LeaseAccount(Protocol):
    """One owner's account in the ledger, for one rank. Every method may raise BusyError."""

    granule_bytes: int

    @property
    def wanted_bytes(self) -> int:
        """What the scheduler wants this rank to hold in all; lowered before a plan lets granules go."""

    @property
    def leased_bytes(self) -> int:
        """What the ledger has promised."""

    @property
    def created_most(self) -> int:
        """Granules that are counted on, of those ever created: the rest is to be withdrawn; 0 for all."""

    @property
    def ready_bytes(self) -> int:
        """What exists as handles."""

    def fileno(self) -> int:
        """Return the doorbell's descriptor."""

    def drain(self) -> None:
        """Empty the doorbell."""

    def acknowledge(self) -> None:
        """Apply what tools have set: limit, floor, weight."""

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Ask for more; return what was granted, in whole granules; the rest is noted as demand."""

    def created(self, granules: int) -> None:
        """Count granules whose handles exist now."""

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0,
                  granules_withdrawn: int = 0) -> None:  # fmt: skip
        """Lower the promise: by what was never made, and by granules whose handles are gone.

        Those released stay among those ever created; those withdrawn were never counted on.
        """

    def recount(self, granules: int) -> None:
        """Count so many granules more as created, and as released since."""

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0,
                map_times: Sequence[int] = ()) -> None:  # fmt: skip
        """Tell observers what is mapped, what is used besides, (un)maps since, a tally of all maps' times."""

    def refuse(self, unmet_bytes: int) -> None:
        """Note demand that could not be met; 0 clears it."""


class MappingStats(NamedTuple):
    """What is mapped now, and granules mapped and unmapped since the pool began."""

    mapped_bytes: int
    maps: int
    unmaps: int
    map_times: tuple[int, ...] = ()  # the words of a tally
