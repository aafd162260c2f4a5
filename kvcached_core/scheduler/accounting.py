"""The counts that a governor needs; each engine's plugin keeps them over its own free list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvcached_core.scheduler.mapped_set import PlanChange


class PlanSource(Protocol):
    """Granules mapped and unmapped since the last plan."""

    @property
    def changed(self) -> bool:
        """Say whether a granule was mapped or unmapped."""

    @property
    def gives_back(self) -> bool:
        """Say whether a granule was unmapped."""

    def take_change(self) -> PlanChange:
        """Return what changed since the last call, and start anew."""


class GranuleAccounting(Protocol):
    """Blocks by granule: used by requests, cached, or clean (free, with contents that nobody needs).

    Every count is cheap to read.
    """

    @property
    def mapped_set(self) -> PlanSource:
        """The changes for the next plan."""

    @property
    def granule_count(self) -> int:
        """Granules of the whole reserved address range."""

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
        """Mapped granules that stay until requests end. An engine that cannot tell counts too many."""

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
        """Unmap until at most `granules` are mapped, or all that are left hold a used block.

        `evict` is called with the cached blocks of each granule that goes, as a sized collection.
        """

    def expire(self, now: float, seconds: float, evict: Callable[[Any], None]) -> float | None:
        """Evict cached blocks not used for `seconds`; return when the next ones are due, or None."""

    def check(self) -> None:
        """Raise InvariantError unless the counts add up."""
