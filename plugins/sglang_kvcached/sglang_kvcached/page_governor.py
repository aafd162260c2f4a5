"""The governor of an engine whose free memory lies in several page pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcached_core.scheduler.governor import Governor, LedgerView
from sglang_kvcached.accounting import PoolAccounting


class PageGovernor(Governor):
    """Computes demand for each page pool, as a free page of one pool cannot serve another pool.

    A token takes a page of every pool, so a demand in blocks is a whole number of pages of every pool.
    """

    def __init__(
        self,
        accounting: PoolAccounting,
        ledger: LedgerView,
        spare_granules: int,
        idle_seconds: float,
        event: Callable[..., None],
        remaining_pages: Callable[[], int] = lambda: 0,
    ) -> None:
        """`remaining_pages` returns the pages of every pool that all requests may still take."""
        super().__init__(
            accounting, ledger, lambda _: None, spare_granules, idle_seconds, event,
            remaining_granules=lambda: accounting.granules_for(accounting.of_every_pool(remaining_pages())),
        )  # fmt: skip
        self._accounting = accounting

    def want_at_least(self, pages: Sequence[int]) -> int:
        """Raise the memory that this engine wants so that these pages of each pool can be taken.

        Return the granules that the engine must then hold.
        """
        granules = min(self.limit, self._accounting.granules_with(pages))
        self.enough = max(self.enough, granules)
        self.wanted = max(self.wanted, min(self.limit, self.enough + self._spare))
        self._publish()
        return granules

    def _granules_for(self, demand_blocks: int) -> int:
        pages = demand_blocks // self._accounting.blocks_of_every_pool
        return self._accounting.granules_for(self._accounting.of_every_pool(pages))
