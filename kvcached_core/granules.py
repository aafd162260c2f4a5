"""Which block to hand out next, and which granule to give up. No engine, no torch, no clock.

A block is clean (mapped, free, nothing worth keeping), used (a request holds it) or cached (free, but its
contents may serve a later request). A granule is a fixed group of blocks that is mapped and unmapped as one:

    unmapped -> busy (a block is used) -> idle (none used, some cached) -> empty (all clean) -> unmapped

No operation looks at all granules or all blocks: the cost of each is constant, or logarithmic in the number of
granules, per block it is given.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from .errors import InvariantError


class Change(NamedTuple):
    """Granules to unmap and to map since the last change was taken; disjoint and sorted."""

    unmap: tuple[int, ...]
    map: tuple[int, ...]


class Granules:
    """Blocks 0 <= b < `block_count` in `granule_count` groups; block 0 is used from the beginning to the end.

    `first_blocks[g]` is the first of the `blocks_per_granule` blocks of granule g. Blocks in none are never handed out.
    `free_blocks` is what may be taken now: it moves only with the blocks that come and go, never by itself,
    until `set_budget` is called.
    """

    def __init__(self, first_blocks: Sequence[int], blocks_per_granule: int, block_count: int) -> None:
        if not first_blocks or first_blocks[0] != 0 or blocks_per_granule < 2:
            raise InvariantError("granule 0 must begin at block 0 and hold another block beside it")
        self.blocks_per_granule = blocks_per_granule
        self.granule_count = len(first_blocks)
        self._first = list(first_blocks)
        self._granule_of = [-1] * block_count
        for granule, first in enumerate(first_blocks):
            self._granule_of[first : first + blocks_per_granule] = [granule] * blocks_per_granule
        # Clean blocks of a granule, the one to hand out next at the end; None while it is unmapped.
        self._clean: list[list[int] | None] = [None] * self.granule_count
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
        block_zero = self._clean[0]
        assert block_zero is not None and block_zero.pop() == 0
        self._used[0] = self.used_blocks = 1
        self.empty -= 1
        self.clean_blocks -= 1
        self.set_budget(1)

    # -- blocks that come and go -------------------------------------------------------------------------

    def take(self, count: int) -> list[int]:
        """Turn up to `count` clean blocks into used ones and return them.

        The lowest mapped granule gives first; a new one is mapped while the budget has room. Fewer are
        returned when only cached blocks are left: evict with `hold`.
        """
        taken: list[int] = []
        while len(taken) < count:
            granule = self._lowest_open()
            if granule is None:
                if self.mapped >= min(self.budget, self.granule_count):
                    break
                self._map_next()
                continue
            self._take_from(granule, count - len(taken), taken)
        number = len(taken)
        self.clean_blocks -= number
        self.used_blocks += number
        self.free_blocks -= number
        return taken

    def _take_from(self, granule: int, count: int, taken: list[int]) -> None:
        clean = self._clean[granule]
        assert clean is not None
        if not self._used[granule]:
            self._leave_rest(granule)
        if count >= len(clean):
            self._used[granule] += len(clean)
            clean.reverse()
            taken += clean
            clean.clear()
        else:
            self._used[granule] += count
            taken += clean[: -count - 1 : -1]
            del clean[-count:]

    def free(self, blocks: Iterable[int]) -> None:
        """Turn used blocks into clean ones."""
        clean_of, used, granule_of = self._clean, self._used, self._granule_of
        number = 0
        for block in blocks:
            granule = granule_of[block]
            clean = clean_of[granule]
            clean.append(block)  # type: ignore[union-attr]  # a used block is mapped (I5)
            number += 1
            used[granule] -= 1
            if not self._in_open[granule]:
                self._reopen(granule)
            if not used[granule]:
                self._rest(granule)
        self.used_blocks -= number
        self.clean_blocks += number
        self.free_blocks += number

    def lend(self, blocks: Sequence[int]) -> None:
        """Turn used blocks into cached ones; a granule with none used becomes the youngest victim."""
        used, granule_of, idle = self._used, self._granule_of, self._idle
        for block in blocks:
            granule = granule_of[block]
            left = used[granule] - 1
            used[granule] = left
            if not left:
                idle[granule] = None
        number = len(blocks)
        self.used_blocks -= number
        self.cached_blocks += number
        self.free_blocks += number

    def hold(self, block: int) -> None:
        """Turn a cached block into a used one: a request hit it, or it was evicted to be handed out."""
        granule = self._granule_of[block]
        if not self._used[granule]:
            self._idle.pop(granule, None)
        self._used[granule] += 1
        self.cached_blocks -= 1
        self.used_blocks += 1
        self.free_blocks -= 1

    def drop(self, block: int) -> None:
        """Turn a cached block into a clean one: its contents are worth nothing any more."""
        granule = self._granule_of[block]
        self._clean[granule].append(block)  # type: ignore[union-attr]  # a cached block is mapped (I5)
        self.cached_blocks -= 1
        self.clean_blocks += 1
        if not self._in_open[granule]:
            self._reopen(granule)
        if not self._used[granule]:
            self._rest(granule)

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

    def shrink(self, granules: int, evict: Callable[[list[int]], None]) -> None:
        """Unmap until at most `granules` are mapped or all that are left hold a used block.

        Empty granules go first, the highest before the others; then idle ones, oldest latest use first:
        `evict` is told the cached blocks of each before it goes. Call `set_budget` afterwards.
        """
        while self.mapped > max(1, granules):
            granule = self._highest_empty()
            if granule is None:
                if not self._idle:
                    return
                granule = next(iter(self._idle))
                evict(self._clear(granule))
            self._unmap(granule)

    def _clear(self, granule: int) -> list[int]:
        """Make all cached blocks of an idle granule clean; return them."""
        clean = self._clean[granule]
        assert clean is not None
        first = self._first[granule]
        cached = sorted(set(range(first, first + self.blocks_per_granule)).difference(clean))
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
    def stranded_blocks(self) -> int:
        """Clean blocks in granules that other blocks keep mapped."""
        return self.clean_blocks - self.empty * self.blocks_per_granule

    def _map_next(self) -> None:
        if self._returned:
            granule = heapq.heappop(self._returned)
        else:
            granule = self._fresh
            self._fresh += 1
        first = self._first[granule]
        self._clean[granule] = list(range(first + self.blocks_per_granule - 1, first - 1, -1))
        self.clean_blocks += self.blocks_per_granule
        self.mapped += 1
        if granule in self._to_unmap:
            self._to_unmap.remove(granule)
        else:
            self._to_map.add(granule)
        self._reopen(granule)
        self._rest(granule)

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

    def _lowest_open(self) -> int | None:
        while self._open:
            granule = self._open[0]
            if self._clean[granule]:
                return granule
            heapq.heappop(self._open)
            self._in_open[granule] = 0
        return None

    def _highest_empty(self) -> int | None:
        while self._spent:
            granule = -self._spent[0]
            clean = self._clean[granule]
            if clean is not None and len(clean) == self.blocks_per_granule:
                return granule
            heapq.heappop(self._spent)
            self._in_spent[granule] = 0
        return None

    def _reopen(self, granule: int) -> None:
        if not self._in_open[granule]:
            self._in_open[granule] = 1
            heapq.heappush(self._open, granule)

    def _rest(self, granule: int) -> None:
        """A granule without used blocks: it is idle, or empty once nothing in it is cached."""
        clean = self._clean[granule]
        assert clean is not None
        if len(clean) < self.blocks_per_granule:
            self._idle.setdefault(granule)
            return
        self._idle.pop(granule, None)
        self.empty += 1
        if not self._in_spent[granule]:
            self._in_spent[granule] = 1
            heapq.heappush(self._spent, -granule)

    def _leave_rest(self, granule: int) -> None:
        clean = self._clean[granule]
        assert clean is not None
        if len(clean) == self.blocks_per_granule:
            self.empty -= 1
        else:
            self._idle.pop(granule, None)

    # -- invariants --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InvariantError unless everything adds up (I9, and I5 for blocks); looks at all granules."""
        mapped = [g for g in range(self.granule_count) if self._clean[g] is not None]
        clean = [len(self._clean[g] or ()) for g in mapped]
        resting = {g for g in mapped if not self._used[g]}
        empty = {g for g in resting if len(self._clean[g] or ()) == self.blocks_per_granule}
        expected = {
            "mapped": (self.mapped, len(mapped)),
            "clean": (self.clean_blocks, sum(clean)),
            "used": (self.used_blocks, sum(self._used)),
            "blocks": (
                self.clean_blocks + self.used_blocks + self.cached_blocks,
                self.mapped * self.blocks_per_granule,
            ),
            "empty": (self.empty, len(empty)),
            "idle": (set(self._idle), resting - empty),
            "block 0": (self._used[0] > 0 and 0 not in (self._clean[0] or ()), True),
            "doubles": (sum(clean), len(set(chain.from_iterable(self._clean[g] or () for g in mapped)))),
            "plan": (self._to_map & self._to_unmap, set()),
        }
        wrong = {name: pair for name, pair in expected.items() if pair[0] != pair[1]}
        if wrong or self.free_blocks < 0:
            raise InvariantError(f"granules do not add up: {wrong}, free {self.free_blocks}")
