"""The handles of one rank that are not mapped, and the counts of all it ever created and released."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain

from kvcached_core.driver.base import Driver
from kvcached_core.errors import CapacityError, DriverError, InvariantError
from kvcached_core.units import format_size
from kvcached_core.worker.arena import Handles
from kvcached_core.worker.lease_account import LeaseAccount
from kvcached_core.worker.unreported import Unreported

log = logging.getLogger(__name__)

_REPORT_GRANULES = 32  # freed before the ledger is told, which wakes engines that wait for memory


class HandlePool:
    """The handles of one rank that are not mapped. Granules here are the ledger's.

    Invariant: created - released = mapped + deferred + premapped + len(spare) + cleaning + freeing. The
    first three are the ElasticPool's. `changed` guards `spare` and the counts, and is never held across a
    driver call here. All methods but take() are called by one thread at a time.
    """

    def __init__(
        self,
        driver: Driver,
        page_bytes: int,
        segments: int,
        account: LeaseAccount,
        changed: threading.Condition,
    ) -> None:
        """Start without handles; a granule is `segments` handles of `page_bytes`.

        Raises InvariantError if the account counts granules of another size.
        """
        if account.granule_bytes != page_bytes * segments:
            raise InvariantError(
                f"granule of the account: {account.granule_bytes}, of the pool: {page_bytes * segments}"
            )
        self._driver = driver
        self._page_bytes = page_bytes
        self.segments = segments
        self._account = account
        self._changed = changed
        self.spare: deque[Handles] = deque()
        self.cleaning = 0  # granules that are about to be spare
        self.created = 0
        self.released = 0
        self.release_target = 0  # plans let so many granules go; released <= release_target once none is owed
        self._freeing: list[int] = []  # handles of the one granule that is being freed
        self.unreported = Unreported(account)
        self.asleep = False  # while asleep, no memory is wanted

    @property
    def owed(self) -> int:
        """Granules to free that are not being freed yet: released by plans, or surplus."""
        return max(0, self.release_target - self.released + self._surplus - self.freeing)

    @property
    def _surplus(self) -> int:
        """Granules above the cap that the scheduler set because other ranks created fewer."""
        most = self._account.created_most
        return max(0, self.created - max(most, self.released + 1)) if most else 0

    @property
    def freeing(self) -> int:
        """Granules that are neither usable nor free yet: 0 or 1."""
        return 1 if self._freeing else 0

    def take_first(self) -> Handles:
        """Lease and create one granule in the caller's thread. Raises CapacityError if refused."""
        granule_bytes, memory = self._account.granule_bytes, self._driver.memory()
        if self._account.lease(granule_bytes, memory) < granule_bytes:
            raise CapacityError(
                f"no room for the first granule of {format_size(granule_bytes)}: "
                f"{format_size(memory.free_bytes)} of {format_size(memory.total_bytes)} are free, and the "
                "ledger grants no lease of it"
            )
        with ExitStack() as undo:
            undo.callback(self._account.give_back, bytes_never_ready=granule_bytes)
            handles = self.create_granule()
            undo.pop_all()
        self.created += 1
        self.unreported.created += 1
        self.report()
        return handles

    def free_first(self, granules: list[Handles]) -> None:
        """Free granules that take_first() created, and give their leases back."""
        with ExitStack() as steps:
            for handle in (handle for handles in granules for handle in handles):
                steps.callback(self._driver.release, handle)
        self.released += len(granules)
        self.unreported.released += len(granules)
        self.report()

    def create_granule(self) -> Handles:
        """Create the handles of one granule, all or none. Raises what the driver raises."""
        with ExitStack() as undo:
            handles = []
            for _ in range(self.segments):
                handles.append(self._driver.create(self._page_bytes))
                undo.callback(self._driver.release, handles[-1])
            undo.pop_all()
        return tuple(handles)

    def add_created(self, granules: Sequence[Handles]) -> None:
        """Make new granules spare."""
        with self._changed:
            self.spare.extend(granules)
            self.created += len(granules)
            self._changed.notify_all()
        # Reported after they are spare: a plan that the scheduler makes from the report finds them.
        self.unreported.created += len(granules)

    def take(self, most: int = 1) -> list[Handles]:
        """Return the handles of up to `most` spare granules; the caller holds `changed`."""
        return [self.spare.popleft() for _ in range(min(most, len(self.spare)))]

    def put(self, granules: Sequence[Handles], clean: bool = True) -> None:
        """Clean granules that are counted in `cleaning`, then make them spare."""
        try:
            for handle in chain.from_iterable(granules) if clean else ():
                self._driver.clean(handle)
        except (CapacityError, DriverError):
            log.exception("cleaning a page failed; it is zeroed when it is mapped")
        with self._changed:
            self.cleaning -= len(granules)
            self.spare.extend(granules)
            self._changed.notify_all()

    def release_owed(self) -> None:
        """Free spare granules until none is owed. The caller reports the last of them."""
        while self._choose_freeing():
            while self._freeing:
                self._driver.release(self._freeing[-1])
                with self._changed:
                    self._freeing.pop()
                    if not self._freeing:
                        self._note_freed()
            if self.unreported.released + self.unreported.withdrawn >= _REPORT_GRANULES:
                self.report()

    def _note_freed(self) -> None:
        if self.released < self.release_target:
            self.released += 1
            self.unreported.released += 1
        else:
            self.created -= 1
            self.unreported.withdrawn += 1

    def report(self) -> None:
        """Report to the ledger; counts that a busy ledger refuses wait for the next call."""
        self.unreported.report()

    @property
    def is_reported(self) -> bool:
        """Say whether the ledger has all counts."""
        return self.unreported.is_empty

    def recount(self, created: int) -> None:
        """Raise the count of created granules to `created`, and count the added ones as released.

        Call it only when all counts have been reported. Raises InvariantError if more were created.
        """
        more = created - self.created
        if more < 0:
            raise InvariantError(f"{self.created} granules were made, not {created}")
        with self._changed:
            self.created += more
            self.released += more
            self.release_target = self.released
        self._account.recount(more)

    def close(self) -> None:
        """Free every handle that is not mapped; continue after a failure and raise the last one."""
        with ExitStack() as steps:
            for handle in [*self._freeing, *(handle for handles in self.spare for handle in handles)]:
                steps.callback(self._driver.release, handle)
            self._freeing.clear()
            self.spare.clear()

    def give_back_all(self) -> None:
        """Give all leases back, after the driver has freed all memory."""
        self.unreported.released += self.created - self.released
        self.released = self.created
        self.report()
        if not self.is_reported:
            log.warning("the ledger was busy: what this owner held is counted until its slot is freed")

    def _choose_freeing(self) -> bool:
        with self._changed:
            if not self._freeing and self.owed and self.spare:
                self._freeing = list(self.spare.popleft())
            return bool(self._freeing)
