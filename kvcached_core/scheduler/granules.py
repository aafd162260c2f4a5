"""Decides which block to hand out next and which granule to give up, without engine, torch or clock.

A block is clean (mapped and free, its contents are not needed), used (a request holds it) or cached (free,
but a later request may use its contents). A granule is a fixed group of blocks, mapped and unmapped as one:

    unmapped -> busy (a block is used) -> idle (none used, some cached) -> empty (all clean) -> unmapped

No operation of a step looks at all granules or all blocks: the cost for each block is constant or
logarithmic in the number of granules. `take`, `free`, `lend` and `hold` see every block of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from kvcached_core.scheduler.granule_table import BlockT, GranuleTable


class Granules(GranuleTable[BlockT]):
    """The engine's `blocks` in granules. Block 0, the null block, is always used.

    `first_blocks[g]` is the first of the `blocks_per_granule` blocks of granule g. Blocks outside all
    granules are never handed out. `free_blocks` is how many blocks may be taken now. Between two calls of
    `set_budget` it changes only as blocks are taken and freed.
    """

    def __init__(
        self, blocks: Sequence[BlockT], first_blocks: Sequence[int], blocks_per_granule: int
    ) -> None:
        """Map granule 0 and use block 0. Raises InvariantError unless granule 0 begins with block 0."""
        super().__init__(blocks, first_blocks, blocks_per_granule)
        self._map_next()
        self.mapped_set.take_change()  # granule 0 is mapped before the first plan (I7)
        block_zero = self.take(1)
        assert block_zero[0].block_id == 0
        self.set_budget(1)

    # -- blocks taken and freed --------------------------------------------------------------------------

    def take(self, count: int) -> list[BlockT]:
        """Turn up to `count` clean blocks into used ones and return them.

        Blocks come from the lowest mapped granule first. A new granule is mapped while the budget has room.
        If fewer are returned, only cached blocks are left: evict with `take_stale`, then with `hold`.
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

    # A request's blocks lie together, so `free` and `lend` count runs of blocks of one granule.

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
        """Turn used blocks into cached ones. A granule without used blocks is evicted last from now on."""
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
        """Evict whole granules not used for long, the oldest first: blocks of one age stay together.

        Call it only once `take` has found nothing. Returns up to `count` blocks that are used now, and others
        that are clean now; the engine must forget all of them. If these are too few, evict the oldest blocks
        with `hold`.
        """
        # Nothing is clean here, so every mapped block that is not used is cached.
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
        """Turn cached blocks into used ones: the engine evicted them to hand them out."""
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
        """Turn a cached block into a clean one: its contents are no longer needed."""
        granule = self._granule_of[block.block_id]
        clean = self._clean[granule]
        if not clean:
            heappush(self._open, granule)
        clean.append(block)
        self.clean_blocks += 1
        if len(clean) == self.blocks_per_granule:
            del self._idle[granule]
            self._rest(granule, len(clean))

    # -- granules mapped and unmapped --------------------------------------------------------------------

    def set_budget(self, granules: int) -> None:
        """Set how many granules may be mapped, and count the free blocks again; between steps only.

        Over the budget no block is free until granules are given up: then mapped granules only fall (I2).
        """
        used = self.used_blocks
        self.budget = max(1, min(granules, self.granule_count))
        # Clean and cached blocks, and those of granules that may still be mapped.
        self.free_blocks = self.budget * self.blocks_per_granule - used if self.mapped <= self.budget else 0
        self.capacity_blocks = self.free_blocks + used

    def shrink(self, granules: int, evict: Callable[[list[BlockT]], None]) -> None:
        """Unmap until at most `granules` are mapped, or all that are left hold a used block.

        Empty granules go first, the highest before the others. Then idle granules go, the one not used for
        longest first; `evict` is called with the cached blocks of each. Call `set_budget` afterwards.
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
        """Evict the cached blocks of idle granules not used for `seconds`. The granules stay mapped, empty.

        Returns when the next granule is due, or None. Uses before the next call count as uses at `now`.
        """
        self._now = now
        while self._idle:
            granule, used_at = next(iter(self._idle.items()))
            if now < used_at + seconds:
                return used_at + seconds
            evict(self._clear(granule))
        return None

    def _clear(self, granule: int) -> list[BlockT]:
        """Make all cached blocks of an idle granule clean, and return them."""
        clean = {block.block_id for block in self._clean[granule]}
        first = self._first[granule]
        blocks = self._blocks[first : first + self.blocks_per_granule]
        cached = [block for block in blocks if block.block_id not in clean]
        for block in cached:
            self.drop(block)
        return cached

    def _map_next(self) -> bool:
        """Map another granule when none is open; return False if the budget has no room."""
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
        """Note that no block of a granule is used any more: it is idle, or empty if all are clean."""
        if clean < self.blocks_per_granule:
            self._idle[granule] = self._now
            self._rested_at[granule] = self._lent_blocks
        else:
            self._empties.add(granule)

    def _wake(self, granule: int, clean: int) -> None:
        """Note that a granule without used blocks is about to have one."""
        if clean < self.blocks_per_granule:
            del self._idle[granule]
        else:
            self._empties.remove()
