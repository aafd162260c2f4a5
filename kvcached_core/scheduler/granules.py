"""Which block to hand out next, and which granule to give up. No engine, no torch, no clock.

A block is clean (mapped, free, nothing worth keeping), used (a request holds it) or cached (free, but its
contents may serve a later request). A granule is a fixed group of blocks that is mapped and unmapped as one:

    unmapped -> busy (a block is used) -> idle (none used, some cached) -> empty (all clean) -> unmapped

No operation looks at all granules or all blocks: the cost of each is constant, or logarithmic in the number
of granules, per block it is given. `take`, `free`, `lend` and `hold` see every block of every step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

from kvcached_core.errors import InvariantError
from kvcached_core.scheduler.empty_granules import EmptyGranules
from kvcached_core.scheduler.granule_sums import sums
from kvcached_core.scheduler.mapped_set import MappedSet


class Block(Protocol):
    """What is asked of an engine's block: its index."""

    block_id: int


BlockT = TypeVar("BlockT", bound=Block)


class Granules(Generic[BlockT]):
    """The engine's `blocks` in groups; block 0 is used from the beginning to the end.

    `first_blocks[g]` is the first of the `blocks_per_granule` blocks of granule g. Blocks in none are never
    handed out. `free_blocks` is what may be taken now: it moves only with the blocks that come and go, never
    by itself, until `set_budget` is called.
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
        # Clean blocks of a granule, the one to hand out next at the end; none while it is unmapped.
        self._clean: list[list[BlockT]] = [[] for _ in first_blocks]
        self._used = [0] * self.granule_count
        self._now = 0.0  # what time it was when expire() was called last: ages are as coarse
        # When it was last used; oldest latest use first. A plain dictionary would search for its first entry.
        self._idle: OrderedDict[int, float] = OrderedDict()
        # How many blocks had been lent, in all and when the last used block of a granule left.
        self._lent_blocks = 0
        self._rested_at = [0] * self.granule_count
        # An idle granule is evicted whole once this times what is cached was lent since its latest use.
        self.stale_turns = 1.25
        self._open: list[int] = []  # heap: every granule with a clean block, and some that were unmapped
        self._empties = EmptyGranules(self.granule_count)
        self.budget = 1
        self.clean_blocks = 0
        self.capacity_blocks = self.free_blocks = 0  # what is free or used; what is free
        self._map_next()
        self.mapped_set.take_change()  # granule 0 is mapped before the first plan (I7)
        block_zero = self.take(1)
        assert block_zero[0].block_id == 0
        self.set_budget(1)

    # -- blocks that come and go -------------------------------------------------------------------------

    def take(self, count: int) -> list[BlockT]:
        """Turn up to `count` clean blocks into used ones and return them.

        The lowest mapped granule gives first; a new one is mapped while the budget has room. Fewer are
        returned when only cached blocks are left: evict with `take_stale`, or else `hold`.
        """
        taken: list[BlockT] = []
        clean_of, used, is_open = self._clean, self._used, self._open
        missing = count
        while missing:
            if not is_open and not self._map_next():
                break
            granule = is_open[0]
            clean = clean_of[granule]
            number = len(clean)
            if not used[granule]:
                if not number:
                    heappop(is_open)  # it was unmapped
                    continue
                self._wake(granule, number)
            if number > missing:
                taken += clean[: -missing - 1 : -1]
                del clean[-missing:]
                used[granule] += missing
                missing = 0
            else:
                heappop(is_open)
                clean.reverse()
                taken += clean
                clean.clear()
                used[granule] += number
                missing -= number
        self.clean_blocks -= count - missing
        self.free_blocks -= count - missing
        return taken

    # A request's blocks lie together: the books are kept by runs of blocks of one granule.

    def free(self, blocks: Sequence[BlockT]) -> None:
        """Turn used blocks into clean ones."""
        clean_of, granule_of = self._clean, self._granule_of
        last, before = -1, 0
        clean: list[BlockT] = []
        for block in blocks:
            granule = granule_of[block.block_id]
            if granule != last:
                if clean:
                    self._freed(last, before, len(clean))
                last, clean = granule, clean_of[granule]
                before = len(clean)
            clean.append(block)
        if clean:
            self._freed(last, before, len(clean))
        self.clean_blocks += len(blocks)
        self.free_blocks += len(blocks)

    def _freed(self, granule: int, clean_before: int, clean: int) -> None:
        if not clean_before:
            heappush(self._open, granule)
        left = self._used[granule] = self._used[granule] - (clean - clean_before)
        if not left:
            self._rest(granule, clean)

    def lend(self, blocks: Sequence[BlockT]) -> None:
        """Turn used blocks into cached ones; a granule with none used becomes the youngest victim."""
        granule_of = self._granule_of
        last, count = -1, 0
        for block in blocks:
            granule = granule_of[block.block_id]
            if granule != last:
                if count:
                    self._lent(last, count)
                last, count = granule, 0
            count += 1
        if count:
            self._lent(last, count)
        self._lent_blocks += len(blocks)
        self.free_blocks += len(blocks)

    def _lent(self, granule: int, count: int) -> None:
        left = self._used[granule] = self._used[granule] - count
        if not left:
            self._idle[granule] = self._now
            self._rested_at[granule] = self._lent_blocks

    def take_stale(self, count: int) -> tuple[list[BlockT], list[BlockT]]:
        """Evict idle granules whole, oldest latest use first, as far as that is long ago: ages stay together.

        Only once `take` has found nothing. Returns up to `count` blocks that are used now and others that are
        clean; all are to be evicted. If these are too few, evict the oldest blocks with `hold`.
        """
        # All that is mapped and not used is cached.
        cached_blocks = self.mapped_set.mapped * self.blocks_per_granule - self.used_blocks
        rested_by = self._lent_blocks - self.stale_turns * cached_blocks
        taken: list[BlockT] = []
        left: list[BlockT] = []
        while len(taken) < count and self._idle:
            granule = next(iter(self._idle))
            if self._rested_at[granule] > rested_by:
                break
            first = self._first[granule]
            del self._idle[granule]
            taken += self._blocks[first : first + self.blocks_per_granule]
            left = taken[count:]
            self._used[granule] = self.blocks_per_granule - len(left)
        if left:
            del taken[count:]
            self._clean[granule] += reversed(left)
            self.clean_blocks += len(left)
            heappush(self._open, granule)
        self.free_blocks -= len(taken)
        return taken, left

    def hold(self, blocks: Sequence[BlockT]) -> None:
        """Turn cached blocks into used ones: they were evicted to be handed out."""
        used, granule_of = self._used, self._granule_of
        for block in blocks:
            granule = granule_of[block.block_id]
            before = used[granule]
            used[granule] = before + 1
            if not before:
                del self._idle[granule]
        self.free_blocks -= len(blocks)

    def hold_one(self, block: BlockT) -> None:
        """Turn a cached block into a used one: a request hit it."""
        granule = self._granule_of[block.block_id]
        before = self._used[granule]
        self._used[granule] = before + 1
        if not before:
            del self._idle[granule]
        self.free_blocks -= 1

    def drop(self, block: BlockT) -> None:
        """Turn a cached block into a clean one: its contents are worth nothing any more."""
        granule = self._granule_of[block.block_id]
        clean = self._clean[granule]
        if not clean:
            heappush(self._open, granule)
        clean.append(block)
        self.clean_blocks += 1
        if len(clean) == self.blocks_per_granule:
            del self._idle[granule]
            self._rest(granule, len(clean))

    # -- granules that come and go -----------------------------------------------------------------------

    def set_budget(self, granules: int) -> None:
        """Set how many granules may be mapped and count anew what is free; between steps only.

        Over the budget nothing is free until granules were given up: what is mapped then only falls (I2).
        """
        used = self.used_blocks
        self.budget = max(1, min(granules, self.granule_count))
        # Clean, cached, and what may still be mapped; what is over the budget does not count.
        self.free_blocks = self.budget * self.blocks_per_granule - used if self.mapped <= self.budget else 0
        self.capacity_blocks = self.free_blocks + used

    def shrink(self, granules: int, evict: Callable[[list[BlockT]], None]) -> None:
        """Unmap until at most `granules` are mapped or all that are left hold a used block.

        Empty granules go first, the highest before the others; then idle ones, oldest latest use first:
        `evict` is told the cached blocks of each before it goes. Call `set_budget` afterwards.
        """
        while self.mapped > max(1, granules):
            granule = self._empties.highest(self._is_empty)
            if granule < 0:
                if not self._idle:
                    return
                granule = next(iter(self._idle))
                evict(self._clear(granule))
            self._unmap(granule)

    def expire(self, now: float, seconds: float, evict: Callable[[list[BlockT]], None]) -> float | None:
        """Evict what idle granules cache, where it was last used so long ago; they stay mapped, and empty.

        Returns when the next one is due, or None. What is used until it is called again, is used `now`.
        """
        self._now = now
        while self._idle:
            granule, used_at = next(iter(self._idle.items()))
            if now < used_at + seconds:
                return used_at + seconds
            evict(self._clear(granule))
        return None

    def _clear(self, granule: int) -> list[BlockT]:
        """Make all cached blocks of an idle granule clean; return them."""
        clean = {block.block_id for block in self._clean[granule]}
        first = self._first[granule]
        blocks = self._blocks[first : first + self.blocks_per_granule]
        cached = [block for block in blocks if block.block_id not in clean]
        for block in cached:
            self.drop(block)
        return cached

    @property
    def mapped(self) -> int:
        """Granules that are mapped."""
        return self.mapped_set.mapped

    @property
    def empty(self) -> int:
        """Mapped granules with nothing in them."""
        return self._empties.count

    @property
    def busy(self) -> int:
        """Mapped granules with a used block: they can only be given up when requests end."""
        return self.mapped_set.mapped - self.empty - len(self._idle)

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold, and block 0."""
        return self.capacity_blocks - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that are mapped, and neither clean nor used."""
        return self.mapped * self.blocks_per_granule - self.clean_blocks - self.used_blocks

    @property
    def stranded_blocks(self) -> int:
        """Clean blocks in granules that other blocks keep mapped."""
        return self.clean_blocks - self.empty * self.blocks_per_granule

    def _map_next(self) -> bool:
        """Map another granule once no other is open; say False if the budget has no room for it."""
        if self.mapped >= self.budget:
            return False
        granule = self.mapped_set.map_lowest()
        first = self._first[granule]
        self._clean[granule] += reversed(self._blocks[first : first + self.blocks_per_granule])
        self.clean_blocks += self.blocks_per_granule
        heappush(self._open, granule)  # no double: _open was empty
        self._rest(granule, self.blocks_per_granule)
        return True

    def _unmap(self, granule: int) -> None:
        self.mapped_set.unmap(granule)
        self._clean[granule].clear()
        self.clean_blocks -= self.blocks_per_granule
        self._empties.remove()

    def _rest(self, granule: int, clean: int) -> None:
        """The last used block of a granule has gone: it is idle, or empty if nothing in it is cached."""
        if clean < self.blocks_per_granule:
            self._idle[granule] = self._now
            self._rested_at[granule] = self._lent_blocks
        else:
            self._empties.add(granule)

    def _wake(self, granule: int, clean: int) -> None:
        """A granule with no used block is about to have one."""
        if clean < self.blocks_per_granule:
            del self._idle[granule]
        else:
            self._empties.remove()

    def _is_empty(self, granule: int) -> bool:
        return len(self._clean[granule]) == self.blocks_per_granule

    def clean(self) -> list[BlockT]:
        """Return all clean blocks of mapped granules, the next to be handed out first; looks at all."""
        return [block for clean in self._clean for block in reversed(clean)]

    def check(self) -> None:
        """Raise InvariantError unless everything adds up (I9, and I5 for blocks); looks at all granules."""
        self.mapped_set.check()
        wrong = {name: pair for name, pair in sums(self).items() if pair[0] != pair[1]}
        if wrong or self.free_blocks < 0:
            raise InvariantError(f"granules do not add up: {wrong}, free {self.free_blocks}")
