"""The governor when other engines ask for memory: memory it gives at once, later, and never."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from devkit.report import record
from kvcached_core.scheduler import governor
from kvcached_core.scheduler.floor_grace import FLOOR_GRACE_SECONDS
from tests.core.governed import COUNT, IDLE_SECONDS, SIZE, SPARE, Engine, serving
from tests.core.test_governor import GovernorMachine


def busy_granules(engine: Engine) -> set[int]:
    """Return the granules that requests or block 0 keep."""
    return {0} | {block.block_id // SIZE for block in engine.used}


class AskedMachine(GovernorMachine):
    """GovernorMachine, with other engines that ask for memory and withdraw their requests."""

    given = refused_to_give = preempted = 0
    over_since: float | None = None
    growth = 0  # blocks that running requests may take in the next step

    @initialize(spare=st.integers(0, 3), cache_seconds=st.sampled_from([0.0, 0.0, 1.0, 5.0]))
    def start(self, spare: int, cache_seconds: float) -> None:
        super().start(spare, cache_seconds)
        self._update = self.engine.governor.update
        self.engine.governor.update = self._update_and_look  # type: ignore[method-assign, assignment]

    @rule(soft=st.integers(0, COUNT + 2), must=st.integers(0, COUNT + 2))
    def ask(self, soft: int, must: int) -> None:
        ledger = self.engine.ledger
        ledger.must, ledger.target = must, min(soft, must) if soft and must else soft

    @rule(blocks=st.integers(0, 2 * SIZE))
    def grow(self, blocks: int) -> None:
        self.growth = blocks

    @rule()
    def ask_no_more(self) -> None:
        self.engine.ledger.must = self.engine.ledger.target = 0

    @rule(granules=st.integers(1, COUNT))
    def serve(self, granules: int) -> None:
        engine = self.engine
        engine.governor.update(self.now, granules * SIZE, busy=True)
        engine.ledger.grant()
        engine.governor.refresh()
        engine.take(min(granules * SIZE, engine.granules.free_blocks))
        engine.send_plan()

    @rule(seconds=st.sampled_from([0.01, 0.1, FLOOR_GRACE_SECONDS]))
    def pass_a_moment(self, seconds: float) -> None:
        self.now += seconds

    @rule(waits=st.sampled_from([0.0, 0.1, FLOOR_GRACE_SECONDS]), busy=st.booleans(), cached=st.booleans())
    def preempt_if_told(self, waits: float, busy: bool, cached: bool) -> None:
        engine, governor = self.engine, self.engine.governor
        governor.update(self.now, 0, busy)
        self.now += waits
        governor.update(self.now, 0, busy)
        most = governor.must_preempt_to(self.now)
        if most is not None:
            while governor.must_preempt_to(self.now) is not None:
                engine.put(1, cached)
            assert len(busy_granules(engine)) == most, "no more than it must"
            governor.update(self.now, 0, busy)
            assert governor.held <= most and governor.must_preempt_to(self.now) is None
            type(self).preempted += 1
        engine.send_plan()

    @rule(granules=st.integers(3, COUNT), must=st.integers(1, 4), cached=st.booleans())
    def a_floor_is_asked_for_and_not_left(self, granules: int, must: int, cached: bool) -> None:
        self.serve(granules)
        self.engine.ledger.target = self.engine.ledger.must = must
        self.preempt_if_told(FLOOR_GRACE_SECONDS, True, cached)

    def _update_and_look(self, now: float, demand_blocks: int, busy: bool) -> None:
        governor, granules, ledger = self.engine.governor, self.engine.granules, self.engine.ledger
        growth, free_before = min(self.growth, demand_blocks), granules.free_blocks
        is_due = self.over_since is not None and now >= self.over_since + FLOOR_GRACE_SECONDS
        self._update(now, demand_blocks, busy, growth)
        self._budget_follows_the_ledger()
        in_use, used = busy_granules(self.engine), len(self.engine.used) + 1
        most = min(granule for granule in (governor.limit, ledger.target, ledger.must) if granule)
        kept = ledger.must if ledger.must and is_due else max(most, -(-(used + growth) // SIZE))
        assert in_use <= set(granules.mapped_set.granules()), "what requests use is not touched"
        assert governor.held <= max(min(kept, governor.limit), len(in_use)), "all else is given at once"
        assert governor.over_target == (governor.held > most and most < governor.limit)
        type(self).refused_to_give += governor.over_target
        type(self).given += governor.held == most < governor.limit
        if granules.mapped <= governor.limit and not is_due:
            room = min(growth, free_before, governor.limit * SIZE - used)
            assert granules.free_blocks >= room, "who runs still grows into what was free"
        self._nobody_is_preempted_before_the_grace_has_passed(len(in_use))

    def _nobody_is_preempted_before_the_grace_has_passed(self, in_use: int) -> None:
        governor, must = self.engine.governor, self.engine.ledger.must
        if not 0 < must < governor.held:
            self.over_since = None
            assert governor.must_preempt_to(self.now) is None
            return
        self.over_since = self.now if self.over_since is None else self.over_since
        due_at = self.over_since + FLOOR_GRACE_SECONDS
        assert governor.must_preempt_to(self.now) == (must if self.now >= due_at and in_use > must else None)
        assert self.now >= due_at or (governor.deadline is not None and governor.deadline <= due_at)


def test_i2_i5_i9_hold_whatever_others_ask_for() -> None:
    run_state_machine_as_test(
        AskedMachine,
        settings=settings(max_examples=200, stateful_step_count=40, deadline=None, database=None),
    )
    record("governor.asked_steps", AskedMachine.steps)
    assert min(AskedMachine.given, AskedMachine.refused_to_give, AskedMachine.preempted) > 20


def ask(
    engine: Engine, now: float, target: int = 0, must: int = 0, busy: bool = False, growth: int = 0
) -> None:
    """Let other engines ask for memory, then update the governor."""
    engine.ledger.target, engine.ledger.must = target, must
    engine.governor.update(now, growth, busy, growth)


def test_what_is_asked_for_is_given_at_once_spare_first_and_cached_last() -> None:
    engine = serving(6 * SIZE)
    engine.put(3 * SIZE, cached=True)  # granules 0 to 3 lose at least one used block; granule 0 keeps block 0
    engine.put(2 * SIZE, cached=False)
    assert (engine.governor.held, engine.granules.mapped, engine.granules.empty) == (9, 7, 1)
    cached = list(engine.cached)
    ask(engine, 0.1, target=7)
    assert (engine.governor.held, engine.granules.mapped) == (7, 7), "what was not mapped"
    ask(engine, 0.1, target=6)
    assert (engine.governor.held, engine.granules.mapped, engine.cached) == (6, 6, cached), "what was empty"
    assert engine.events == []
    ask(engine, 0.1, target=4)
    assert (engine.governor.held, engine.granules.mapped) == (4, 4)
    assert engine.events == [("evict", {"granules": 2, "blocks": len(cached) - len(engine.cached)})]
    assert engine.governor.plan_gives_back and not engine.governor.over_target
    plan = engine.send_plan()
    assert plan is not None and plan.released == 5


def test_an_idle_engine_gives_in_slices_so_that_its_worker_begins_early_and_a_busy_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(governor, "IDLE_SLICE_GRANULES", 2)
    engine = serving(8 * SIZE)
    engine.put(8 * SIZE, cached=True)
    mapped = []
    for now in (0.1, 0.2, 0.3):
        ask(engine, now, target=2)
        assert engine.governor.plan_gives_back, "so the engine's loop comes again"
        assert engine.governor.deadline == now, "or is woken"
        engine.send_plan()
        mapped.append(engine.granules.mapped)
    assert mapped == [7, 5, 3]
    ask(engine, 0.4, target=2, busy=True)
    engine.send_plan()
    assert engine.granules.mapped == engine.governor.held == 2
    ask(engine, 0.5, target=2)
    assert not engine.governor.plan_gives_back


def test_a_target_does_not_cap_what_is_wanted_and_what_was_given_is_not_wanted_again() -> None:
    engine = serving(6 * SIZE)
    engine.put(6 * SIZE, cached=True)
    ask(engine, 0.1, target=3, busy=True)
    assert engine.governor.held == 3 and engine.ledger.told[-1].wanted_granules == 3 + SPARE
    assert engine.ledger.told[-1].needed_granules == 1, "cache is wanted, and needed by no request"
    engine.governor.update(0.2, 8 * SIZE, busy=True)
    assert engine.governor.wanted > 3 and engine.governor.needed == 9, "the ledger decides what it gets"


def test_what_requests_hold_is_kept_and_nobody_new_is_admitted() -> None:
    engine = serving(6 * SIZE)
    ask(engine, 0.1, target=2, busy=True)
    assert (engine.governor.held, engine.granules.mapped) == (7, 7) and engine.governor.over_target
    assert not engine.governor.waiting, "nothing is on its way to who holds too much"
    assert engine.governor.must_preempt_to(1000.0) is None, "a share is restored by attrition"
    engine.send_plan()
    engine.put(6 * SIZE, cached=True)
    engine.governor.update(0.2, 0, busy=True)
    assert engine.governor.held == 2 and not engine.governor.over_target
    ask(engine, 0.3, target=0, busy=True)
    assert not engine.governor.over_target


def test_running_requests_keep_what_they_grow_into_until_a_floor_is_due() -> None:
    engine = serving(6 * SIZE)
    full = engine.granules.stranded_blocks
    ask(engine, 1.0, target=2, must=2, busy=True, growth=full + 1)
    assert (engine.governor.held, engine.granules.busy) == (8, 7) and engine.granules.free_blocks > full
    engine.put(6 * SIZE - 1, cached=True)
    assert engine.granules.busy == 2
    ask(engine, 1.1, target=2, must=2, busy=True, growth=2 * SIZE)
    assert engine.governor.held == 3, "one block, block 0, and eight more"
    ask(engine, 1.0 + FLOOR_GRACE_SECONDS, target=2, must=2, busy=True, growth=2 * SIZE)
    assert engine.governor.held == 2 and engine.governor.must_preempt_to(9.0) is None


def test_a_target_that_cannot_be_met_is_no_reason_to_run_or_to_wake() -> None:
    engine = serving(6 * SIZE)
    ask(engine, 0.1, target=2)
    engine.send_plan()
    for now in (0.2, 0.3, 50.0):
        engine.governor.update(now, 0, busy=False)
        assert not engine.governor.has_plan and engine.governor.deadline is None
    assert engine.governor.over_target


def test_requests_are_preempted_for_a_floor_after_its_grace_and_not_before() -> None:
    engine = serving(6 * SIZE)
    ask(engine, 1.0, target=2, must=4)
    assert engine.governor.deadline == 1.0 + FLOOR_GRACE_SECONDS, "an idle loop looks again in time"
    assert engine.governor.must_preempt_to(1.29) is None
    ask(engine, 1.2, target=2, must=3)
    assert engine.governor.must_preempt_to(1.0 + FLOOR_GRACE_SECONDS) == 3, "asked for more, it is not later"
    engine.governor.update(2.0, 0, busy=False)
    assert engine.governor.deadline is None, "it was woken for this once"
    engine.put(3 * SIZE, cached=True)
    assert engine.governor.must_preempt_to(2.0) == 3
    engine.put(2 * SIZE, cached=True)
    assert engine.governor.must_preempt_to(2.0) is None and engine.granules.busy == 3
    engine.governor.update(2.0, 0, busy=False)
    assert engine.governor.held == 3 and engine.governor.over_target


def test_a_floor_that_is_restored_or_asked_for_no_more_begins_a_new_grace() -> None:
    engine = serving(6 * SIZE)
    ask(engine, 1.0, must=3)
    ask(engine, 1.2)
    ask(engine, 1.4, must=3)
    assert engine.governor.must_preempt_to(1.5) is None
    assert engine.governor.must_preempt_to(1.4 + FLOOR_GRACE_SECONDS) == 3
    assert engine.governor.over_target, "what is asked for a floor is a target too"


def test_the_earlier_of_two_deadlines_counts_and_the_later_one_is_not_lost() -> None:
    engine = serving(8 * SIZE)
    engine.put(4 * SIZE, cached=False)
    engine.governor.update(10.0, 0, busy=False)
    assert engine.governor.deadline == 10.0 + IDLE_SECONDS
    engine.ledger.must = 4
    engine.governor.update(10.1, 0, busy=False)
    assert (
        engine.governor.held == engine.granules.busy == 6
        and engine.governor.deadline == 10.1 + FLOOR_GRACE_SECONDS
    )
    engine.ledger.must = 0
    engine.put(SIZE, cached=False)
    engine.governor.update(10.2, 0, busy=False)
    assert engine.governor.deadline == 10.2 + IDLE_SECONDS


@pytest.mark.parametrize(("target", "refused", "granules"), [(0, False, COUNT), (5, False, 5), (5, True, 3)])
def test_what_is_attainable_is_what_others_leave(target: int, refused: bool, granules: int) -> None:
    engine = Engine()
    engine.governor.update(0.0, 5 * SIZE, busy=True)
    engine.ledger.ranks = [3, 3]
    engine.ledger.is_refused = refused
    ask(engine, 0.1, target=target)
    assert engine.governor.attainable_blocks == granules * SIZE
