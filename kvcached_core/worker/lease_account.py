"""The part of a ledger account that a pool uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvcached_core.driver.base import MemoryInfo


class LeaseAccount(Protocol):
    """One owner's account in the ledger, for one rank. Every method may raise BusyError."""

    granule_bytes: int

    @property
    def wanted_bytes(self) -> int:
        """Bytes that the scheduler wants this rank to hold; lowered before a plan lets granules go."""

    @property
    def leased_bytes(self) -> int:
        """Bytes that the ledger has leased to this rank."""

    @property
    def created_most(self) -> int:
        """The cap on granules ever created: the rank withdraws those above it. 0 means no cap."""

    @property
    def ready_bytes(self) -> int:
        """Bytes that exist as handles."""

    def fileno(self) -> int:
        """Return the doorbell's descriptor."""

    def drain(self) -> None:
        """Empty the doorbell."""

    def acknowledge(self) -> None:
        """Apply the limit, floor and weight that tools have set."""

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Ask for more bytes; return those granted, in whole granules. The rest is noted as demand."""

    def created(self, granules: int) -> None:
        """Add granules whose handles exist now."""

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0,
                  granules_withdrawn: int = 0) -> None:  # fmt: skip
        """Lower the lease by bytes that were never created and by granules whose handles are gone.

        Released granules stay in the count of those ever created. Withdrawn ones leave it: the scheduler
        never counted on them.
        """

    def recount(self, granules: int) -> None:
        """Add granules that count as created and released at once."""

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0,
                map_times: Sequence[int] = ()) -> None:  # fmt: skip
        """Show observers the mapped bytes, the bytes used outside the KV cache, the granules mapped and
        unmapped since the last call, and the histogram of all map times."""

    def refuse(self, unmet_bytes: int) -> None:
        """Note demand that was not met; 0 clears it."""


class MappingStats(NamedTuple):
    """Bytes mapped now, and granules mapped and unmapped since the pool began."""

    mapped_bytes: int
    maps: int
    unmaps: int
    map_times: tuple[int, ...] = ()  # the words of a histogram
