"""What a governor asks of an engine's books, however the engine keeps its free blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvcached_core.scheduler.mapped_set import Change


class PlanChanges(Protocol):
    """Granules mapped and unmapped since the last plan."""

    @property
    def changed(self) -> bool:
        """Say whether `take_change` would return anything."""

    @property
    def gives_back(self) -> bool:
        """Say whether the next change unmaps anything."""

    def take_change(self) -> Change:
        """Return what changed since the last call."""


class GranuleAccounting(Protocol):
    """Blocks in granules: used by requests, cached, or clean. All counts are cheap to read."""

    @property
    def extent(self) -> PlanChanges:
        """What the next plan is made of."""

    @property
    def granule_count(self) -> int:
        """Granules of the whole reserved range."""

    @property
    def blocks_per_granule(self) -> int:
        """Blocks of one granule."""

    @property
    def mapped(self) -> int:
        """Granules that are mapped."""

    @property
    def empty(self) -> int:
        """Mapped granules known to have neither a used nor a cached block."""

    @property
    def busy(self) -> int:
        """Mapped granules that can only be given up when requests end; never fewer than there are."""

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, and block 0."""

    @property
    def cached_blocks(self) -> int:
        """Blocks that only the prefix cache keeps."""

    @property
    def stranded_blocks(self) -> int:
        """Clean blocks in granules that are not known to be empty."""

    def set_budget(self, granules: int) -> None:
        """Set how many granules may be mapped; between steps only."""

    def shrink(self, granules: int, evict: Callable[[Any], None]) -> None:
        """Unmap until at most `granules` are mapped or all that are left hold a used block.

        `evict` is told the cached blocks that go (a sized collection).
        """

    def expire(self, now: float, seconds: float, evict: Callable[[Any], None]) -> float | None:
        """Evict what is cached and was not used for so long; return when the next is due, or None."""

    def check(self) -> None:
        """Raise InvariantError unless everything adds up."""
