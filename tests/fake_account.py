"""An account that grants from a fixed capacity, without a ledger file."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import BusyError


class FakeAccount:
    """A ledger account with no other owners. The next `busy` calls that lock the ledger find it locked."""

    def __init__(self, granule_bytes: int, limit_bytes: int, notify_at: int = 0) -> None:
        self.reached = threading.Event()  # set when `notify_at` granules have been created
        self._notify_at = notify_at
        self.granule_bytes = granule_bytes
        self.limit_bytes = limit_bytes
        self.wanted_bytes = 0
        self.leased_bytes = self.ready_bytes = 0
        self.created_granules = self.released_granules = self.created_most = 0
        self.demand_bytes = 0
        self.published = (0, 0)
        self.maps = self.unmaps = 0
        self.acknowledged = 0
        self.busy = 0
        self.denied = False
        self.leases = 0
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def want(self, granules: int) -> None:
        """Record how many granules the engine wants, and ring the doorbell."""
        self.wanted_bytes = granules * self.granule_bytes
        os.eventfd_write(self._bell, 1)

    def fileno(self) -> int:
        """Return the doorbell's descriptor."""
        return self._bell

    def drain(self) -> None:
        """Clear the doorbell."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return

    def acknowledge(self) -> None:
        """Count."""
        self._lock()
        self.acknowledged += 1

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Grant whole granules, up to the limit and up to the free memory that is not promised yet."""
        self._lock()
        self.leases += 1
        room = min(self.limit_bytes, memory.free_bytes + self.ready_bytes) - self.leased_bytes
        granted = (
            0 if self.denied else max(0, min(want_bytes, room)) // self.granule_bytes * self.granule_bytes
        )
        self.demand_bytes = max(want_bytes, self.wanted_bytes - self.leased_bytes) - granted
        self.leased_bytes += granted
        return granted

    def created(self, granules: int) -> None:
        """Count created granules."""
        self._lock()
        self.created_granules += granules
        self.ready_bytes += granules * self.granule_bytes
        if self.created_granules >= self._notify_at:
            self.reached.set()

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0,
                  granules_withdrawn: int = 0) -> None:  # fmt: skip
        """Lower the leased bytes."""
        self._lock()
        self.released_granules += granules_released
        self.created_granules -= granules_withdrawn
        gone = (granules_released + granules_withdrawn) * self.granule_bytes
        self.ready_bytes -= gone
        self.leased_bytes -= gone + bytes_never_ready

    def recount(self, granules: int) -> None:
        """Count."""
        self.created_granules += granules
        self.released_granules += granules

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0,
                map_times: Sequence[int] = ()) -> None:  # fmt: skip
        """Keep."""
        self._lock()
        assert mapped_bytes <= self.ready_bytes, "I2"
        self.maps, self.unmaps = self.maps + maps, self.unmaps + unmaps
        self.published = (mapped_bytes, private_now_bytes)

    def refuse(self, unmet_bytes: int) -> None:
        """Keep."""
        self._lock()
        self.demand_bytes = unmet_bytes

    def close(self) -> None:
        """Close the doorbell."""
        os.close(self._bell)

    def _lock(self) -> None:
        if self.busy:
            self.busy -= 1
            raise BusyError("fake: locked")
