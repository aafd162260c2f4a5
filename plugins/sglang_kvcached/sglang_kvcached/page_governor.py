"""The governor of an engine whose pages lie on several sheets."""

from __future__ import annotations

from collections.abc import Sequence

from kvcached_core.scheduler.governor import Governor
from sglang_kvcached.accounting import PoolAccounting


class PageGovernor(Governor):
    """A governor that is asked for pages of each sheet: a sheet has no use for what is free in another."""

    asked: Sequence[int] = ()

    def _granules_for(self, demand_blocks: int) -> int:
        return self._books.granules_for(self.asked)

    def ask(self, pages: Sequence[int]) -> int:
        """Want at least what so many pages of each sheet take; returns the granules to hold for that."""
        asked = min(self.limit, self._books.granules_with(pages))
        self.enough = max(self.enough, asked)
        self.wanted = max(self.wanted, min(self.limit, self.enough + self._spare))
        self._publish()
        return asked

    @property
    def _books(self) -> PoolAccounting:
        assert isinstance(self.granules, PoolAccounting)
        return self.granules
