"""Which block to hand out next, and which granule to give up. No engine, no torch, no clock.

A block is clean (mapped, free, nothing worth keeping), used (a request holds it) or cached (free, but its
contents may serve a later request). A granule is a fixed group of blocks that is mapped and unmapped as one:

    unmapped -> busy (a block is used) -> idle (none used, some cached) -> empty (all clean) -> unmapped

No operation looks at all granules or all blocks: the cost of each is constant, or logarithmic in the number of
granules, per block it is given.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from .errors import InvariantError


class Block(Protocol):
    """What is asked of an engine's block: its index."""

    block_id: int


BlockT = TypeVar("BlockT", bound=Block)


class Change(NamedTuple):
    """Granules to unmap and to map since the last change was taken; disjoint and sorted."""

    unmap: tuple[int, ...]
    map: tuple[int, ...]


class Granules(Generic[BlockT]):
    """The engine's `blocks` in groups; block 0 is used from the beginning to the end.

    `first_blocks[g]` is the first of the `blocks_per_granule` blocks of granule g. Blocks in none are never handed out.
    `free_blocks` is what may be taken now: it moves only with the blocks that come and go, never by itself,
    until `set_budget` is called.
    """

    def __init__(
        self, blocks: Sequence[BlockT], first_blocks: Sequence[int], blocks_per_granule: int
    ) -> None:
        if not first_blocks or first_blocks[0] != 0 or blocks_per_granule < 2:
            raise InvariantError("granule 0 must begin at block 0 and hold another block beside it")
        self.blocks_per_granule = blocks_per_granule
        self.granule_count = len(first_blocks)
        self._blocks = blocks
        self._first = list(first_blocks)
        self._granule_of = [-1] * len(blocks)
        for granule, first in enumerate(first_blocks):
            self._granule_of[first : first + blocks_per_granule] = [granule] * blocks_per_granule
        # Clean blocks of a granule, the one to hand out next at the end; None while it is unmapped.
        self._clean: list[list[BlockT] | None] = [None] * self.granule_count
        self._used = [0] * self.granule_count
        self._idle: dict[int, None] = {}  # oldest latest use first
        self._open: list[int] = []  # heap: mapped granules that may have a clean block
        self._in_open = bytearray(self.granule_count)
        self._spent: list[int] = []  # heap of -g: granules that may be empty
        self._in_spent = bytearray(self.granule_count)
        self._returned: list[int] = []  # heap: granules below _fresh that are unmapped
        self._fresh = 0  # every granule >= _fresh has never been mapped
        self._to_map: set[int] = set()
        self._to_unmap: set[int] = set()
        self.mapped = self.empty = 0
        self.clean_blocks = self.used_blocks = self.cached_blocks = 0
        self.budget = 1
        self.free_blocks = 0
        self._begin()

    def _begin(self) -> None:
        self._map_next()
        self._to_map.clear()  # granule 0 is mapped before the first plan (I7)
        block_zero = self.take(1)
        assert block_zero[0].block_id == 0
        self.set_budget(1)

    # -- blocks that come and go -------------------------------------------------------------------------

    def take(self, count: int) -> list[BlockT]:
        """Turn up to `count` clean blocks into used ones and return them.

        The lowest mapped granule gives first; a new one is mapped while the budget has room. Fewer are
        returned when only cached blocks are left: evict with `hold`.
        """
        taken: list[BlockT] = []
        missing = count
        while missing:
            granule = self._lowest_open()
            if granule < 0:
                if self.mapped >= min(self.budget, self.granule_count):
                    break
                granule = self._map_next()
            clean: list[BlockT] = self._clean[granule]  # type: ignore[assignment]  # an open granule is mapped
            if not self._used[granule]:
                self._wake(granule, len(clean))
            number = len(clean)
            if number > missing:
                taken += clean[: -missing - 1 : -1]
                del clean[-missing:]
                self._used[granule] += missing
                missing = 0
            else:
                clean.reverse()
                taken += clean
                clean.clear()
                self._used[granule] += number
                missing -= number
        self._count_taken(count - missing)
        return taken

    def _count_taken(self, number: int) -> None:
        self.clean_blocks -= number
        self.used_blocks += number
        self.free_blocks -= number

    def free(self, blocks: Sequence[BlockT]) -> None:
        """Turn used blocks into clean ones."""
        clean_of, used, granule_of, is_open = self._clean, self._used, self._granule_of, self._in_open
        for block in blocks:
            granule = granule_of[block.block_id]
            clean: list[BlockT] = clean_of[granule]  # type: ignore[assignment]  # a used block is mapped (I5)
            if not clean and not is_open[granule]:
                is_open[granule] = 1
                heapq.heappush(self._open, granule)
            clean.append(block)
            left = used[granule] - 1
            used[granule] = left
            if not left:
                self._rest(granule, len(clean))
        number = len(blocks)
        self.used_blocks -= number
        self.clean_blocks += number
        self.free_blocks += number

    def lend(self, blocks: Sequence[BlockT]) -> None:
        """Turn used blocks into cached ones; a granule with none used becomes the youngest victim."""
        used, granule_of = self._used, self._granule_of
        for block in blocks:
            granule = granule_of[block.block_id]
            left = used[granule] - 1
            used[granule] = left
            if not left:
                self._idle[granule] = None
        number = len(blocks)
        self.used_blocks -= number
        self.cached_blocks += number
        self.free_blocks += number

    def hold(self, blocks: Sequence[BlockT]) -> None:
        """Turn cached blocks into used ones: a request hit them, or they were evicted to be handed out."""
        used, granule_of = self._used, self._granule_of
        for block in blocks:
            granule = granule_of[block.block_id]
            before = used[granule]
            used[granule] = before + 1
            if not before:
                del self._idle[granule]
        number = len(blocks)
        self.cached_blocks -= number
        self.used_blocks += number
        self.free_blocks -= number

    def drop(self, block: BlockT) -> None:
        """Turn a cached block into a clean one: its contents are worth nothing any more."""
        granule = self._granule_of[block.block_id]
        granule_clean: list[BlockT] = self._clean[granule]  # type: ignore[assignment]  # (I5)
        granule_clean.append(block)
        self.cached_blocks -= 1
        self.clean_blocks += 1
        if not self._in_open[granule]:
            self._in_open[granule] = 1
            heapq.heappush(self._open, granule)
        if len(granule_clean) == self.blocks_per_granule:
            del self._idle[granule]
            self._rest(granule, self.blocks_per_granule)

    # -- granules that come and go -----------------------------------------------------------------------

    def set_budget(self, granules: int) -> None:
        """Set how many granules may be mapped and count anew what is free; between steps only.

        Over the budget nothing is free until granules were given up: what is mapped then only falls (I2).
        """
        self.budget = max(1, granules)
        room = min(self.budget, self.granule_count) - self.mapped
        if room < 0:
            self.free_blocks = 0
        else:
            self.free_blocks = self.clean_blocks + self.cached_blocks + room * self.blocks_per_granule

    def shrink(self, granules: int, evict: Callable[[list[BlockT]], None]) -> None:
        """Unmap until at most `granules` are mapped or all that are left hold a used block.

        Empty granules go first, the highest before the others; then idle ones, oldest latest use first:
        `evict` is told the cached blocks of each before it goes. Call `set_budget` afterwards.
        """
        while self.mapped > max(1, granules):
            granule = self._highest_empty()
            if granule < 0:
                if not self._idle:
                    return
                granule = next(iter(self._idle))
                evict(self._clear(granule))
            self._unmap(granule)

    def _clear(self, granule: int) -> list[BlockT]:
        """Make all cached blocks of an idle granule clean; return them."""
        clean = {block.block_id for block in self._clean[granule] or ()}
        first = self._first[granule]
        blocks = self._blocks[first : first + self.blocks_per_granule]
        cached = [block for block in blocks if block.block_id not in clean]
        for block in cached:
            self.drop(block)
        return cached

    def take_change(self) -> Change:
        """Return what changed since the last call; a granule that came and went is in neither list."""
        change = Change(tuple(sorted(self._to_unmap)), tuple(sorted(self._to_map)))
        self._to_unmap.clear()
        self._to_map.clear()
        return change

    @property
    def changed(self) -> bool:
        """Say whether `take_change` would return anything."""
        return bool(self._to_map or self._to_unmap)

    @property
    def gives_back(self) -> bool:
        """Say whether the next change unmaps anything."""
        return bool(self._to_unmap)

    @property
    def stranded_blocks(self) -> int:
        """Clean blocks in granules that other blocks keep mapped."""
        return self.clean_blocks - self.empty * self.blocks_per_granule

    def _map_next(self) -> int:
        if self._returned:
            granule = heapq.heappop(self._returned)
        else:
            granule = self._fresh
            self._fresh += 1
        first = self._first[granule]
        self._clean[granule] = [*reversed(self._blocks[first : first + self.blocks_per_granule])]
        self.clean_blocks += self.blocks_per_granule
        self.mapped += 1
        if granule in self._to_unmap:
            self._to_unmap.remove(granule)
        else:
            self._to_map.add(granule)
        if not self._in_open[granule]:
            self._in_open[granule] = 1
            heapq.heappush(self._open, granule)
        self._rest(granule, self.blocks_per_granule)
        return granule

    def _unmap(self, granule: int) -> None:
        self.empty -= 1
        self._clean[granule] = None
        self.clean_blocks -= self.blocks_per_granule
        self.mapped -= 1
        heapq.heappush(self._returned, granule)
        if granule in self._to_map:
            self._to_map.remove(granule)
        else:
            self._to_unmap.add(granule)

    # -- which granule is next; the heaps are lazy: an entry may be stale, but each granule has at most one ----

    def _lowest_open(self) -> int:
        """Return the lowest mapped granule with a clean block, or -1."""
        is_open = self._open
        while is_open:
            granule = is_open[0]
            if self._clean[granule]:
                return granule
            heapq.heappop(is_open)
            self._in_open[granule] = 0
        return -1

    def _highest_empty(self) -> int:
        """Return the highest empty granule, or -1."""
        while self._spent:
            granule = -self._spent[0]
            if len(self._clean[granule] or ()) == self.blocks_per_granule:
                return granule
            heapq.heappop(self._spent)
            self._in_spent[granule] = 0
        return -1

    def _rest(self, granule: int, clean: int) -> None:
        """The last used block of a granule has gone: it is idle, or empty if nothing in it is cached."""
        if clean < self.blocks_per_granule:
            self._idle[granule] = None
            return
        self.empty += 1
        if not self._in_spent[granule]:
            self._in_spent[granule] = 1
            heapq.heappush(self._spent, -granule)

    def _wake(self, granule: int, clean: int) -> None:
        """A granule with no used block is about to have one."""
        if clean < self.blocks_per_granule:
            del self._idle[granule]
        else:
            self.empty -= 1

    def clean(self) -> list[BlockT]:
        """Return all clean blocks of mapped granules, the next to be handed out first; looks at all granules."""
        return [block for clean in self._clean if clean for block in reversed(clean)]

    # -- invariants --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError unless everything adds up (I9, and I5 for blocks); looks at all granules."""
        size = self.blocks_per_granule
        mapped = [g for g in range(self.granule_count) if self._clean[g] is not None]
        clean = {g: len(self._clean[g] or ()) for g in mapped}
        resting = {g for g in mapped if not self._used[g]}
        empty = {g for g in resting if clean[g] == size}
        clean_ids = [block.block_id for block in self.clean()]
        expected = {
            "mapped": (self.mapped, len(mapped)),
            "clean": (self.clean_blocks, len(clean_ids)),
            "used": (self.used_blocks, sum(self._used)),
            "blocks": (
                self.clean_blocks + self.used_blocks + self.cached_blocks,
                self.mapped * size,
            ),
            "empty": (self.empty, len(empty)),
            "idle": (set(self._idle), resting - empty),
            "block 0": (self._used[0] > 0 and 0 in mapped and 0 not in clean_ids, True),
            "doubles": (len(clean_ids), len(set(clean_ids))),
            "plan": (self._to_map & self._to_unmap, set()),
        }
        wrong = {name: pair for name, pair in expected.items() if pair[0] != pair[1]}
        if wrong or self.free_blocks < 0:
            raise InvariantError(f"granules do not add up: {wrong}, free {self.free_blocks}")
