"""Changes to leases and handles that the ledger has not recorded yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcached_core.errors import BusyError
from kvcached_core.worker.lease_account import LeaseAccount


def tell(call: Callable[..., Any], *arguments: int) -> bool:
    """Call a method of the account; return False if the ledger is busy."""
    try:
        call(*arguments)
    except BusyError:
        return False
    return True


class Unreported:
    """Counts that the ledger has not recorded yet. Meanwhile it counts too much memory as taken, never too
    little."""

    def __init__(self, account: LeaseAccount) -> None:
        """Start with nothing to report to this account."""
        self._account = account
        self.created = self.released = self.withdrawn = 0
        self.never_ready_bytes = 0  # leased, but the driver could not create the handles

    @property
    def is_empty(self) -> bool:
        """Say whether the ledger has recorded everything."""
        return not (self.created or self.never_ready_bytes or self.released or self.withdrawn)

    def report(self) -> None:
        """Report everything to the ledger; counts that a busy ledger refuses wait for the next call."""
        if self.created and tell(self._account.created, self.created):
            self.created = 0
        if self.created:
            return
        gone = self.never_ready_bytes, self.released, self.withdrawn
        if any(gone) and tell(self._account.give_back, *gone):
            self.never_ready_bytes = self.released = self.withdrawn = 0
