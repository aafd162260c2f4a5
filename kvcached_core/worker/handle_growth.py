"""Growth: leases from the ledger become handles, on a thread that no step waits for."""

from __future__ import annotations

import logging

from kvcached_core.driver.base import Driver
from kvcached_core.errors import BusyError, CapacityError, DriverError
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.backoff import Backoff
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.lease_account import LeaseAccount
from kvcached_core.worker.unreported import tell

log = logging.getLogger(__name__)

SLICE_GRANULES = 32  # created in one turn, so that unmapping and freeing never wait long
_REPORT_HANDLES = 64  # created before a waiting step is told: about a millisecond on a GPU


class HandleGrowth:
    """Leases and creates the granules that the scheduler wants. Called by one thread at a time."""

    def __init__(self, driver: Driver, account: LeaseAccount, handles: HandlePool) -> None:
        """Create handles with `driver` for this pool of handles."""
        self._driver = driver
        self._account = account
        self._handles = handles
        self._backoff = Backoff()
        self._demand_bytes = 0  # unmet demand, as the ledger has it
        self._ended: DriverError | None = None  # the failure after which this rank grows no more

    def grow(self, now: float, rung: bool) -> float | None:
        """Lease and create wanted granules; return the seconds until the next call, or None.

        `rung` says that the doorbell asked for this call: then a refused lease is tried again at once.
        """
        granule_bytes = self._account.granule_bytes
        unmet = self._account.wanted_bytes - self._account.leased_bytes
        if unmet < granule_bytes or self._ended or self._handles.asleep:
            self._note_demand_met()
            return None
        if self._account.created_most:
            return None  # the scheduler lifts the cap, and rings, once it sees that the surplus is gone
        if (seconds := self._backoff.seconds_left(now)) > 0 and not rung:
            return seconds
        asked = min(unmet // granule_bytes, SLICE_GRANULES)
        try:
            granted = self._account.lease(asked * granule_bytes, self._driver.memory())
        except BusyError:
            return self._backoff.refused(now)
        except (CapacityError, DriverError) as error:
            self._note_failure(error)
            return self._backoff.refused(now)
        self._demand_bytes = unmet - granted
        made = self._create_leased(granted // granule_bytes)
        # Read again: a report of releases that the ledger was too busy for has lowered the lease.
        unmet = max(0, self._account.wanted_bytes - self._account.leased_bytes)
        if made == asked and unmet < granule_bytes:
            self._note_demand_met()
            return None
        self._demand_bytes = unmet
        if made == asked:
            self._backoff.reset()
            return 0.0
        tell(self._account.refuse, unmet)
        return None if self._ended else self._backoff.refused(now)

    def _create_leased(self, leased: int) -> int:
        """Create granules until `leased` exist or one fails; return how many were created.

        The ledger is told of the first, the second, the fourth and so on, up to a millisecond's work. So a
        step that waits for a few has them at once, and much memory costs little of Python's lock.
        """
        made, most = 0, max(1, _REPORT_HANDLES // self._handles.segments)
        while made < leased:
            count = min(max(1, made), most, leased - made)
            batch = self._create_batch(count)
            self._handles.add_created(batch)
            made += len(batch)
            if len(batch) < count:
                self._handles.unreported.never_ready_bytes += (leased - made) * self._account.granule_bytes
                leased = made
            self._handles.report()
        return made

    def _create_batch(self, count: int) -> list[Handles]:
        """Create `count` granules, or fewer if one fails; note the failure."""
        batch: list[Handles] = []
        try:
            while len(batch) < count:
                batch.append(self._handles.create_granule())
        except (CapacityError, DriverError) as error:
            self._note_failure(error)
        return batch

    def _note_failure(self, error: CapacityError | DriverError) -> None:
        if isinstance(error, DriverError):
            self._ended = error
            log.error("the driver failed; this rank keeps what it has and grows no more: %s", error)
        else:
            log.info("a lease could not be filled, others may have taken the memory: %s", error)

    def _note_demand_met(self) -> None:
        if self._demand_bytes and not self._ended and tell(self._account.refuse, 0):
            self._demand_bytes = 0
        self._backoff.reset()
