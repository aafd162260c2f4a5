"""Granules against a plain model, over random sequences of operations."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from devkit.report import record
from kvcached_core.geometry import make_geometry
from kvcached_core.scheduler.granules import Granules
from tests.core.test_granules import PAGES, Block


class GranuleMachine(RuleBasedStateMachine):
    """`state` of every block of every granule: unmapped, clean, used or cached."""

    steps = 0
    examples = 0
    stale = 0

    @initialize(
        page=st.sampled_from(PAGES),
        granules=st.integers(1, 9),
        stray=st.integers(0, 3),
        stale_turns=st.sampled_from([0.0, 0.5, 1.25]),
    )
    def start(self, page: tuple[int, int], granules: int, stray: int, stale_turns: float) -> None:
        type(self).examples += 1
        page_bytes, stride = page
        blocks = -(-granules * page_bytes // stride) + stray
        geometry = make_geometry(page_bytes, stride, [0], blocks, 1)
        self.blocks = [Block(index) for index in range(blocks)]
        self.size, self.count = geometry.blocks_per_granule, geometry.granule_count
        firsts = [geometry.first_block(granule) for granule in range(self.count)]
        self.members = [set(geometry.blocks(granule)) for granule in range(self.count)]
        self.home = {block: granule for granule, all_of in enumerate(self.members) for block in all_of}
        self.granules = Granules(self.blocks, firsts, self.size)
        self.granules.stale_turns = stale_turns
        self.state = dict.fromkeys(self.home, "unmapped")
        self._become(self.members[0], "clean")
        self.state[0] = "used"
        self.budget = 1
        self.free = self.size - 1
        self.tick = 0
        self.rested: dict[int, int] = {}  # granule -> when its last used block left
        self.planned = {0}  # mapped when the last change was taken

    # -- the model ---------------------------------------------------------------------------------------

    def _become(self, blocks: set[int], state: str) -> None:
        for block in blocks:
            self.state[block] = state

    def _all(self, state: str) -> list[int]:
        return sorted(block for block, now in self.state.items() if now == state)

    def _mapped(self) -> set[int]:
        return {self.home[block] for block, state in self.state.items() if state != "unmapped"}

    def _states(self, granule: int) -> set[str]:
        return {self.state[block] for block in self.members[granule]}

    def _next_granule(self) -> int:
        """Map another granule in the model if no block is clean; return the granule to take from, or -1."""
        clean = [self.home[block] for block in self._all("clean")]
        if clean:
            return min(clean)
        mapped = self._mapped()
        if len(mapped) >= min(self.budget, self.count):
            return -1
        granule = min(set(range(self.count)) - mapped)
        self._become(self.members[granule], "clean")
        return granule

    def _pick(self, state: str, data: st.DataObject, at_most: int = 1 << 30) -> list[Block]:
        there = [block for block in self._all(state) if block]
        count = data.draw(st.integers(0, min(len(there), at_most)))
        return [self.blocks[block] for block in data.draw(st.permutations(there))[:count]]

    def _leave(self, blocks: list[Block], state: str) -> None:
        for block in blocks:
            self.state[block.block_id] = state
            granule = self.home[block.block_id]
            if "used" not in self._states(granule):
                self.tick += 1
                self.rested[granule] = self.tick

    # -- blocks ------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        wanted = data.draw(st.integers(0, self.free))
        taken = self.granules.take(wanted)
        for block in taken:
            granule = self._next_granule()
            assert self.home[block.block_id] == granule, "the lowest mapped granule gives first"
            assert self.state[block.block_id] == "clean"
            self.state[block.block_id] = "used"
        missing = wanted - len(taken)
        if missing:
            assert self._next_granule() == -1, "nothing is evicted while there is memory"
            assert len(self._all("cached")) >= missing, "what counts as free can be had"
            self._evict(missing)
        self.free -= wanted

    def _evict(self, missing: int) -> None:
        stale, left = self.granules.take_stale(missing)
        ids = [block.block_id for block in stale + left]
        type(self).stale += len(ids)
        homes = list(dict.fromkeys(self.home[block] for block in ids))
        idle = [g for g in sorted(self.rested, key=self.rested.__getitem__) if self._states(g) == {"cached"}]
        assert homes == idle[: len(homes)], "the oldest latest use goes first"
        assert set(ids) == {block for granule in homes for block in self.members[granule]}, "they go whole"
        assert len(ids) == len(set(ids)) and len(stale) <= missing and not (left and len(stale) < missing)
        self._become({block.block_id for block in stale}, "used")
        self._become({block.block_id for block in left}, "clean")
        evicted = [self.blocks[block] for block in self._all("cached")[: missing - len(stale)]]
        self.granules.hold(evicted)
        self._become({block.block_id for block in evicted}, "used")

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        blocks = self._pick("used", data)
        self.granules.free(blocks)
        self._leave(blocks, "clean")
        self.free += len(blocks)

    @rule(data=st.data())
    def lend_some(self, data: st.DataObject) -> None:
        blocks = self._pick("used", data)
        self.granules.lend(blocks)
        self._leave(blocks, "cached")
        self.free += len(blocks)

    @rule(data=st.data(), one_by_one=st.booleans())
    def hit_some(self, data: st.DataObject, one_by_one: bool) -> None:
        blocks = self._pick("cached", data, at_most=self.free)
        if one_by_one:
            for block in blocks:
                self.granules.hold_one(block)
        else:
            self.granules.hold(blocks)
        self._become({block.block_id for block in blocks}, "used")
        self.free -= len(blocks)

    @rule(data=st.data())
    def forget_some(self, data: st.DataObject) -> None:
        for block in self._pick("cached", data):
            self.granules.drop(block)
            self.state[block.block_id] = "clean"

    @rule()
    def i8_a_growth_that_finds_no_room_changes_nothing(self) -> None:
        if not self._all("clean") and len(self._mapped()) >= min(self.budget, self.count):
            assert self.granules.take(1) == []

    # -- granules ----------------------------------------------------------------------------------------

    @rule(granules=st.integers(0, 11), budget=st.none() | st.integers(0, 11))
    def shrink(self, granules: int, budget: int | None) -> None:
        evicted: list[set[int]] = []
        self.granules.shrink(granules, lambda blocks: evicted.append({b.block_id for b in blocks}))
        expected = []
        while len(mapped := self._mapped()) > max(1, granules):
            empty = [granule for granule in mapped if self._states(granule) == {"clean"}]
            idle = [granule for granule in mapped if "used" not in self._states(granule)]
            if not idle:
                break
            victim = max(empty) if empty else min(idle, key=self.rested.__getitem__)
            if not empty:
                expected.append({b for b in self.members[victim] if self.state[b] == "cached"})
            self._become(self.members[victim], "unmapped")
        assert evicted == expected, "the oldest latest use goes first, after all that is empty"
        self.set_budget(granules if budget is None else budget)

    @rule(granules=st.integers(0, 11))
    def set_budget(self, granules: int) -> None:
        self.granules.set_budget(granules)
        self.budget = max(1, granules)
        room = min(self.budget, self.count) - len(self._mapped())
        there = len(self._all("clean")) + len(self._all("cached"))
        self.free = 0 if room < 0 else there + room * self.size

    @precondition(lambda self: self.granules.mapped_set.changed)
    @rule()
    def take_change(self) -> None:
        change, mapped = self.granules.mapped_set.take_change(), self._mapped()
        assert set(change.unmap) == self.planned - mapped
        assert set(change.map) == mapped - self.planned
        assert list(change.unmap) == sorted(set(change.unmap)) and list(change.map) == sorted(set(change.map))
        self.planned = mapped

    @invariant()
    def i5_i7_i9_hold_and_the_numbers_are_those_of_the_model(self) -> None:
        type(self).steps += 1
        granules = self.granules
        granules.check()
        mapped = self._mapped()
        assert granules.mapped == len(mapped) and 0 in mapped and self.state[0] == "used"  # I7
        assert sorted(block.block_id for block in granules.clean()) == self._all("clean")
        assert granules.used_blocks == len(self._all("used"))
        assert granules.busy == sum("used" in self._states(granule) for granule in mapped)
        assert granules.cached_blocks == len(self._all("cached"))
        assert granules.free_blocks == self.free  # I9
        assert granules.mapped_set.gives_back == bool(self.planned - mapped)
        assert granules.mapped_set.changed == (self.planned != mapped)
        stranded = [b for b in self._all("clean") if self._states(self.home[b]) != {"clean"}]
        assert granules.stranded_blocks == len(stranded)


def test_i5_i7_i8_i9_hold_after_every_step_of_any_history() -> None:
    run_state_machine_as_test(
        GranuleMachine,
        settings=settings(max_examples=250, stateful_step_count=50, deadline=None, database=None),
    )
    record("granules.steps", GranuleMachine.steps)
    record("granules.examples", GranuleMachine.examples)
    assert GranuleMachine.steps > 5 * GranuleMachine.examples and GranuleMachine.stale > 0
