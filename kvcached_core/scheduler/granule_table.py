"""The state of every granule, and the counts of granules and blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from kvcached_core.errors import InvariantError
from kvcached_core.scheduler.empty_granules import EmptyGranules
from kvcached_core.scheduler.granule_checks import recount
from kvcached_core.scheduler.mapped_set import MappedSet


class Block(Protocol):
    """A block of an engine. Its index is all that matters here."""

    block_id: int


BlockT = TypeVar("BlockT", bound=Block)


class GranuleTable(Generic[BlockT]):
    """The state that `Granules` changes. Every granule is unmapped at first.

    A mapped granule is busy (a request holds a block of it), idle (only cached blocks are left) or empty.
    Every count is cheap to read.
    """

    def __init__(
        self, blocks: Sequence[BlockT], first_blocks: Sequence[int], blocks_per_granule: int
    ) -> None:
        if not first_blocks or first_blocks[0] != 0 or blocks_per_granule < 1:
            raise InvariantError("granule 0 must begin with block 0")
        self.blocks_per_granule = blocks_per_granule
        self.granule_count = len(first_blocks)
        self.mapped_set = MappedSet(self.granule_count)
        self._blocks = blocks
        self._first = list(first_blocks)
        self._granule_of = [-1] * len(blocks)
        for granule, first in enumerate(first_blocks):
            self._granule_of[first : first + blocks_per_granule] = [granule] * blocks_per_granule
        # Clean blocks of each granule, the next one to hand out last; empty while the granule is unmapped.
        self._clean: list[list[BlockT]] = [[] for _ in first_blocks]
        self._used = [0] * self.granule_count
        self._now = 0.0  # time of the latest expire(): ages are no finer
        # Idle granules and when each was last used, oldest first. A plain dict searches for its first key.
        self._idle: OrderedDict[int, float] = OrderedDict()
        # Blocks lent in all, and that number at the time when the last used block of a granule left.
        self._lent_blocks = 0
        self._rested_at = [0] * self.granule_count
        # An idle granule is evicted whole once stale_turns * cached_blocks were lent since its last use.
        self.stale_turns = 1.25
        self._open: list[int] = []  # heap: every granule with a clean block, and some that are unmapped
        self._empties = EmptyGranules(self.granule_count)
        self.budget = 1
        self.clean_blocks = 0
        self.capacity_blocks = 0  # free and used blocks
        self.free_blocks = 0  # clean and cached blocks, and those of granules that may still be mapped

    @property
    def mapped(self) -> int:
        """Granules that are mapped."""
        return self.mapped_set.mapped

    @property
    def empty(self) -> int:
        """Mapped granules that have neither a used nor a cached block."""
        return self._empties.count

    @property
    def busy(self) -> int:
        """Mapped granules with a used block: they stay until requests end."""
        return self.mapped_set.mapped - self.empty - len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, and block 0."""
        return self.capacity_blocks - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Mapped blocks that are neither clean nor used."""
        return self.mapped * self.blocks_per_granule - self.clean_blocks - self.used_blocks

    @property
    def stranded_blocks(self) -> int:
        """Clean blocks in granules that other blocks keep mapped."""
        return self.clean_blocks - self.empty * self.blocks_per_granule

    def _is_empty(self, granule: int) -> bool:
        return len(self._clean[granule]) == self.blocks_per_granule

    def clean(self) -> list[BlockT]:
        """Return all clean blocks, the next one to hand out first. Looks at all granules."""
        return [block for clean in self._clean for block in reversed(clean)]

    def check(self) -> None:
        """Raise InvariantError unless the counts add up (I9, and I5 for blocks). Looks at all granules."""
        self.mapped_set.check()
        wrong = {name: pair for name, pair in recount(self).items() if pair[0] != pair[1]}
        if wrong or self.free_blocks < 0:
            raise InvariantError(f"granules do not add up: {wrong}, free {self.free_blocks}")
