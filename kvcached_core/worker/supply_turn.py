"""One turn of the supply thread: report, unmap, free, lease, create and map ahead, in this order."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvcached_core.errors import BusyError, CapacityError, DriverError
from kvcached_core.worker.background_mapping import BackgroundMapping
from kvcached_core.worker.backoff import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS
from kvcached_core.worker.handle_growth import HandleGrowth
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.lease_account import LeaseAccount, MappingStats

log = logging.getLogger(__name__)

FENCE_POLL_SECONDS = 0.001


class StatsPublisher:
    """Writes a pool's mapping counts into the ledger, as differences to the last ones written."""

    def __init__(
        self, account: LeaseAccount, stats: Callable[[], MappingStats], private_bytes: Callable[[], int]
    ) -> None:
        """`private_bytes` returns the memory that the engine uses besides its KV cache."""
        self._account = account
        self._stats = stats
        self._private_bytes = private_bytes
        self._published = MappingStats(0, 0, 0)

    def publish(self) -> None:
        """Publish the counts. Raises BusyError; the next call then includes what this one could not write."""
        stats, before = self._stats(), self._published
        self._account.publish(
            stats.mapped_bytes, self._private_bytes(), stats.maps - before.maps, stats.unmaps - before.unmaps,
            stats.map_times,
        )  # fmt: skip
        self._published = stats


class SupplyTurn:
    """Does what can be done for a pool off the step path. Run by one thread at a time."""

    def __init__(
        self,
        account: LeaseAccount,
        handles: HandlePool,
        growth: HandleGrowth,
        mapping: BackgroundMapping,
        publisher: StatsPublisher,
    ) -> None:
        """Work for one pool, whose parts these are."""
        self._account = account
        self._handles = handles
        self._growth = growth
        self._mapping = mapping
        self._publisher = publisher
        self.device_failed = False  # if so, this rank gives back no more memory
        self._may_premap = True  # False after a failure, until the doorbell rings

    def run(self, now: float, rung: bool) -> float | None:
        """Do all that can be done now; return the seconds until the next turn, or None if none is needed."""
        self._account.drain()
        waits = []
        if not self._attempt(self._account.acknowledge):
            waits.append(FIRST_RETRY_SECONDS)
        if not self.device_failed:
            try:
                waits += [FENCE_POLL_SECONDS] if self._give_back() else []
            except CapacityError as error:
                waits.append(LAST_RETRY_SECONDS)
                log.warning("the system had no room even to give memory back; trying again: %s", error)
            except DriverError as error:
                # Memory that is still mapped or alive stays counted: too much, never too little.
                self.device_failed = True
                log.error("the driver failed; this rank gives back no more memory: %s", error)
        self._handles.report()
        if (wait := self._growth.grow(now, rung)) is not None:
            waits.append(wait)
        self._may_premap |= rung
        if self._premap():
            waits.append(0.0)
        published = self._attempt(self._publisher.publish)
        if not (self._handles.is_reported and published):
            waits.append(FIRST_RETRY_SECONDS)
        return min(waits) if waits else None

    def _give_back(self) -> int:
        """Unmap and free, slice by slice, so that other engines have the first part of much memory early.

        Returns how many granules still wait for a fence.
        """
        before, waiting = -1, self._mapping.unmap_deferred()
        self._handles.release_owed()
        while waiting and waiting != before:
            before, waiting = waiting, self._mapping.unmap_deferred()
            self._handles.release_owed()
        return waiting

    def _premap(self) -> bool:
        """Map spare granules ahead of need; say whether there may be more to map."""
        if self.device_failed or not self._may_premap:
            return False
        try:
            return self._mapping.premap()
        except (CapacityError, DriverError) as error:
            # No handle is lost. The step that needs one maps it, or raises if that fails too.
            self._may_premap = False
            log.warning("mapping granules ahead of need failed: %s", error)
            return False

    @staticmethod
    def _attempt(call: Callable[[], None]) -> bool:
        try:
            call()
        except BusyError:
            return False
        return True
