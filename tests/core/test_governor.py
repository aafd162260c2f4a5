"""The governor against a ledger that grants at random and changes its mind."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from devkit.report import record
from kvcached_core.errors import InvariantError
from kvcached_core.plan import Plan
from tests.core.governed import COUNT, IDLE_SECONDS, SIZE, SPARE, Engine, serving


class GovernorMachine(RuleBasedStateMachine):
    """Grants, refusals, limits, time and steps of an engine in any order."""

    steps = 0

    @initialize(spare=st.integers(0, 3), cache_seconds=st.sampled_from([0.0, 0.0, 1.0, 5.0]))
    def start(self, spare: int, cache_seconds: float) -> None:
        self.engine = Engine(spare, cache_seconds)
        self.now = 0.0
        self.budget = 1

    @rule(granules=st.integers(1, COUNT), rank=st.sampled_from([None, 0, 1]))
    def grant(self, granules: int, rank: int | None) -> None:
        self.engine.ledger.grant(granules, rank)

    @rule(limit=st.integers(0, COUNT + 3), refused=st.booleans())
    def change_the_ledger(self, limit: int, refused: bool) -> None:
        self.engine.ledger.limit, self.engine.ledger.is_refused = limit, refused

    @rule(seconds=st.sampled_from([0.1, 1.0, IDLE_SECONDS, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(demand=st.integers(0, 2 * SIZE * COUNT), busy=st.booleans(), data=st.data())
    def step(self, demand: int, busy: bool, data: st.DataObject) -> None:
        engine = self.engine
        engine.governor.update(self.now, demand, busy)
        self._budget_follows_the_ledger()
        self._work(data)
        engine.send_plan()

    @rule(demand=st.integers(0, SIZE * COUNT), granules=st.integers(0, 4), data=st.data())
    def step_after_a_wait(self, demand: int, granules: int, data: st.DataObject) -> None:
        engine = self.engine
        engine.governor.update(self.now, demand, busy=True)
        engine.ledger.grant(granules)
        engine.governor.refresh()
        assert engine.governor.held == engine.ledger.created() - engine.governor.released
        self._work(data)
        engine.send_plan()

    @rule()
    def look_while_idle(self) -> None:
        self.engine.governor.update(self.now, 0, busy=False)
        self._budget_follows_the_ledger()
        if self.engine.governor.plan_gives_back:
            self.engine.send_plan()

    def _budget_follows_the_ledger(self) -> None:
        governor, granules, ledger = self.engine.governor, self.engine.granules, self.engine.ledger
        limit = max(1, min(ledger.limit, COUNT))
        assert governor.limit == limit
        assert governor.enough <= governor.wanted <= min(limit, governor.enough + governor._spare)
        assert not governor.waiting or governor.held < governor.enough, "nobody waits for spare ones"
        assert governor.held == ledger.created() - governor.released
        assert governor.held <= max(limit, granules.mapped), "I2: what is over the limit is let go at once"
        assert granules.budget == max(1, min(governor.held, limit))
        assert 1 <= governor.needed <= governor.wanted <= limit
        assert ledger.told[-1].wanted_granules == governor.wanted
        assert ledger.told[-1].released_granules == governor.released
        assert (governor.deadline is None) or governor.deadline > self.now or governor.held == governor.wanted

    def _work(self, data: st.DataObject) -> None:
        engine = self.engine
        engine.put(data.draw(st.integers(0, len(engine.used))), data.draw(st.booleans()))
        engine.take(data.draw(st.integers(0, engine.granules.free_blocks)))

    @invariant()
    def i2_i9_hold(self) -> None:
        type(self).steps += 1
        engine = self.engine
        engine.governor.check()
        assert engine.granules.mapped <= max(1, engine.ledger.created() - engine.governor.released)
        assert engine.granules.used_blocks == len(engine.used) + 1
        assert engine.granules.cached_blocks == len(engine.cached)
        assert all(before != after for before, after in pairwise(engine.ledger.told)), "told twice"


def test_i2_i5_i9_hold_whatever_the_ledger_does() -> None:
    run_state_machine_as_test(
        GovernorMachine,
        settings=settings(max_examples=200, stateful_step_count=40, deadline=None, database=None),
    )
    record("governor.steps", GovernorMachine.steps)
    assert GovernorMachine.steps > 2000


def test_the_budget_is_the_least_that_any_rank_created_less_what_was_released() -> None:
    engine = Engine()
    engine.governor.update(0.0, 5 * SIZE, busy=True)
    assert engine.ledger.told[-1].wanted_granules == 1 + 5 + SPARE, "three blocks of granule 0 are there"
    engine.ledger.ranks = [6, 3]
    engine.governor.update(0.0, 5 * SIZE, busy=True)
    assert (engine.governor.held, engine.granules.budget, engine.granules.free_blocks) == (3, 3, 3 * SIZE - 1)
    assert engine.governor.waiting
    engine.ledger.is_refused = True
    assert not engine.governor.waiting and engine.governor.attainable_blocks == 3 * SIZE
    engine.ledger.is_refused = False
    assert engine.governor.attainable_blocks == COUNT * SIZE


def test_a_lower_limit_is_obeyed_at_once_and_counted_once() -> None:
    engine = serving(6 * SIZE)
    held = engine.governor.held
    engine.put(6 * SIZE, cached=True)
    engine.ledger.limit = 3
    engine.governor.update(0.1, 0, busy=False)
    assert (engine.granules.mapped, engine.governor.held, engine.governor.released) == (3, 3, held - 3)
    # Granule 0 is in use. The two granules that were used last are left; one of them has one cached block.
    assert len(engine.cached) == (SIZE - 1) + SIZE + 1
    assert engine.governor.plan_gives_back
    plan = engine.send_plan()
    assert plan is not None and plan.released == held - 3
    engine.governor.update(0.2, 0, busy=False)
    assert engine.governor.released == held - 3 and engine.send_plan() is None


def test_a_limit_below_what_is_used_takes_effect_as_blocks_come_back() -> None:
    engine = serving(6 * SIZE)
    engine.ledger.limit = 2
    engine.governor.update(0.1, 4, busy=True)
    assert (engine.granules.mapped, engine.governor.held, engine.granules.free_blocks) == (7, 7, 0)
    engine.put(4 * SIZE, cached=False)
    engine.governor.update(0.2, 4, busy=True)
    assert engine.granules.mapped == engine.governor.held == 4 and engine.granules.free_blocks == 0
    engine.put(2 * SIZE, cached=False)
    engine.governor.update(0.3, 4, busy=True)
    assert engine.granules.mapped <= engine.governor.held == 2 and engine.granules.free_blocks == 2 * SIZE - 1


def test_surplus_is_let_go_after_idle_seconds_and_only_the_least_of_the_window() -> None:
    engine = serving(8 * SIZE)
    assert engine.governor.deadline is None
    engine.put(8 * SIZE, cached=False)
    held = engine.governor.held
    engine.governor.update(10.0, 0, busy=False)
    assert engine.governor.deadline == 10.0 + IDLE_SECONDS and engine.governor.released == 0
    engine.governor.update(11.0, 5 * SIZE, busy=False)  # for a moment the engine needs five granules more
    engine.governor.update(11.9, 0, busy=False)
    assert engine.governor.released == 0, "not before the window has passed"
    engine.governor.update(12.0, 0, busy=False)
    # Granule 0, and five more for the 17 blocks that do not fit into granule 0.
    assert engine.governor.held == 1 + 5 and engine.governor.released == held - 6
    engine.governor.update(14.0, 0, busy=False)
    assert engine.governor.held == 1 and engine.governor.deadline is None
    engine.send_plan()
    assert engine.mapped == {0}


def test_surplus_that_requests_may_come_to_need_is_kept_until_they_need_it_no_more() -> None:
    engine = serving(8 * SIZE)
    engine.put(6 * SIZE, cached=False)
    held = engine.governor.held
    engine.remaining_granules = held - 1 - (engine.granules.mapped - engine.granules.empty)
    engine.governor.update(10.0, 0, busy=True)
    engine.governor.update(12.0, 0, busy=True)
    assert engine.governor.held == held - 1, "what they will not need goes"
    for now in (13.0, 14.0, 16.0):
        engine.governor.update(now, 0, busy=True)
        assert engine.governor.held == held - 1
    engine.ledger.target = held - 3
    engine.governor.update(16.5, 0, busy=True)
    assert engine.governor.held == held - 3, "others get it when they ask"
    engine.ledger.target = engine.remaining_granules = 0
    engine.governor.update(18.5, 0, busy=True)
    assert engine.governor.held == engine.governor.wanted < held - 3


def test_a_need_that_uses_all_surplus_stops_the_clock() -> None:
    engine = serving(8 * SIZE)
    engine.put(8 * SIZE, cached=False)
    engine.governor.update(10.0, 0, busy=False)
    engine.governor.update(11.9, COUNT * SIZE, busy=True)
    assert engine.governor.deadline is None
    engine.governor.update(12.5, 0, busy=False)
    assert engine.governor.deadline == 14.5 and engine.governor.released == 0


def test_cached_blocks_are_not_surplus() -> None:
    engine = serving(6 * SIZE)
    engine.put(6 * SIZE, cached=True)
    for now in (10.0, 20.0, 30.0):
        engine.governor.update(now, 0, busy=False)
    assert engine.governor.held == engine.granules.mapped == 7 and len(engine.cached) == 6 * SIZE


def test_a_plan_is_sent_once() -> None:
    engine = serving(3 * SIZE)
    assert engine.plans == [Plan(0, (), (1, 2, 3), 0)] and engine.governor.take_plan() is None
    engine.put(3 * SIZE, cached=False)
    engine.ledger.limit = 1
    engine.governor.update(1.0, 0, busy=False)
    assert engine.governor.plan_gives_back
    assert engine.send_plan() == Plan(1, (1, 2, 3), (), engine.governor.released)


@pytest.mark.parametrize("damage", ["held", "granules"])
def test_check_sees_more_mapped_than_held(damage: str) -> None:
    engine = serving(3 * SIZE)
    engine.governor.check()
    target, name = (engine.governor, "held") if damage == "held" else (engine.granules, "clean_blocks")
    setattr(target, name, 2)
    with pytest.raises(InvariantError):
        engine.governor.check()


def test_what_is_cached_and_not_used_for_the_age_limit_is_evicted_and_its_memory_given_back() -> None:
    engine = Engine(cache_seconds=60.0)
    for now in (0.0, 30.0):
        engine.governor.update(now, 2 * SIZE, busy=True)
        engine.ledger.grant()
        engine.governor.update(now, 2 * SIZE, busy=True)
        engine.take(2 * SIZE)
        engine.put(2 * SIZE, cached=True)
        engine.send_plan()
    engine.governor.update(40.0, 0, busy=False)
    # Granule 0 is never idle, and the last block of the first batch shares granule 2 with newer blocks.
    left = [block for block in engine.cached if block.block_id // SIZE != 1]
    engine.governor.update(59.9, 0, busy=False)
    engine.governor.update(59.9 + 2 * IDLE_SECONDS, 0, busy=False)
    assert engine.cached == left, "only what was used in the last minute is left"
    assert engine.governor.deadline is not None
    engine.governor.update(60.0 + 3 * IDLE_SECONDS, 0, busy=False)
    assert engine.governor.deadline == 90.0, "it wakes for the next one"
    engine.send_plan()
    assert engine.governor.held == engine.granules.mapped == 4
    engine.governor.update(90.0, 0, busy=False)
    assert engine.cached == left[: SIZE - 1]
    assert engine.events == [("evict", {"granules": n, "blocks": b}) for n, b in ((1, 4), (3, 9))]


def test_without_an_age_limit_the_cache_stays_for_ever() -> None:
    engine = serving(4 * SIZE)
    engine.put(4 * SIZE, cached=True)
    engine.governor.update(1e9, 0, busy=False)
    assert len(engine.cached) == 4 * SIZE and engine.governor.deadline != 1e9
