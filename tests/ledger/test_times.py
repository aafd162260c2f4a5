"""Histograms of maps and reclaims: each counts once, and the counts survive the loss of the ledger."""

from __future__ import annotations

import pytest

from kvcached_core.histogram import MAP_BUCKETS, RECLAIM_BUCKETS, Buckets, Histogram, HistogramReading
from kvcached_core.ledger import Runtime, check
from tests.ledger.helpers import GRANULE, attach, die, hold, leave, picture
from tests.ledger.old_owner import OldOwner
from tests.ledger.test_arbiter import Clock, Engine


@pytest.fixture
def clock() -> Clock:
    return Clock()


def reclaims(runtime: Runtime, name: str) -> HistogramReading:
    """Return the histogram of reclaims that an engine shows."""
    (owner,) = (owner for owner in picture(runtime).owners if owner.name == name)
    return owner.reclaim_seconds


def asked(runtime: Runtime, clock: Clock) -> tuple[Engine, Engine]:
    """Return an idle engine that is asked for 14 of its 64 granules, and the engine that asks."""
    idle = Engine(runtime, "idle", clock).holds(2, cached=62, busy=False)
    waiting = Engine(runtime, "waiting", clock).holds(0, missing=14)
    assert waiting.ask(14) == 0 and idle.asked == (50, 0)
    return idle, waiting


def test_a_reclaim_is_timed_once_from_its_writing_until_it_is_met(runtime: Runtime, clock: Clock) -> None:
    idle, waiting = asked(runtime, clock)
    clock.now += 0.03
    idle.give(13)
    assert reclaims(runtime, "idle").total == 0, "one granule is missing"
    clock.now += 0.04
    idle.give(1)
    took = reclaims(runtime, "idle")
    assert took.counts == (0, 0, 0, 0, 1, 0, 0, 0, 0)
    assert took.sum_seconds == pytest.approx(0.07, abs=0.0011), "from the first ask, in whole milliseconds"
    idle.give(2)
    assert reclaims(runtime, "idle").total == 1, "more of the same"
    assert waiting.ask(14) == 14 and idle.asked == (0, 0)
    waiting.holds(14, missing=12)
    assert waiting.ask(12) == 2 and idle.asked[0] > 0
    clock.now += 0.004
    idle.give(10)
    assert reclaims(runtime, "idle").counts[:5] == (1, 0, 0, 0, 1), "an ask of its own"
    assert reclaims(runtime, "waiting").total == 0 and check(picture(runtime)) == []
    idle.account.check()


def test_a_reclaim_that_lapsed_is_not_timed(runtime: Runtime, clock: Clock) -> None:
    idle, _ = asked(runtime, clock)
    clock.now += 1.01
    idle.give(30)
    assert reclaims(runtime, "idle").total == 0


def test_the_times_are_there_again_in_a_ledger_that_was_lost(runtime: Runtime, clock: Clock) -> None:
    idle, _ = asked(runtime, clock)
    idle.give(14)
    tally = Histogram(MAP_BUCKETS)
    for seconds in (1e-5, 2e-5, 2.1e-5, 1.0):
        tally.add(seconds)
    idle.account.publish(GRANULE, 0, map_times=tally.words())
    before = picture(runtime).owners[0]
    assert (
        before.map_seconds == HistogramReading.of(MAP_BUCKETS, tally.words())
        and before.map_seconds.counts[0] == 2
    )
    runtime.device("host").ledger.unlink()
    idle.account.acknowledge()
    after = picture(runtime).owners[0]
    assert (after.map_seconds, after.reclaim_seconds) == (before.map_seconds, before.reclaim_seconds)
    idle.account.check()


def test_an_owner_of_minor_1_shows_none_in_a_slot_that_had_some(runtime: Runtime, clock: Clock) -> None:
    idle, waiting = asked(runtime, clock)
    idle.give(14)
    assert reclaims(runtime, "idle").total == 1
    waiting.view.close()
    leave(waiting.account)
    die(idle.account)
    leave(attach(runtime, "sweeper", name="sweeper"))
    old = OldOwner(runtime, "old", minor=1)
    assert old.slot == 0 and old.lease(40) == 40
    old.put("busy", 1)
    (shown,) = picture(runtime).owners
    assert shown.spoken_claim and shown.busy, "the words of minor 1 hold"
    assert (shown.map_seconds.total, shown.reclaim_seconds.total, shown.asked_since_ms) == (0, 0, 0)
    new = attach(runtime, "new", name="new", clock=clock)
    hold(new, 4)
    assert check(picture(runtime)) == []
    old.leave()


@pytest.mark.parametrize("buckets", [MAP_BUCKETS, RECLAIM_BUCKETS])
def test_a_bucket_ends_with_its_bound_and_all_of_them_are_the_total(buckets: Buckets) -> None:
    tally = Histogram(buckets)
    for bound in buckets.bounds_us:
        tally.add(bound / 1e6)
        tally.add((bound + 1) / 1e6)
    tally.add(-1.0)  # a clock that was set back
    read = HistogramReading.of(buckets, tally.words())
    assert read.counts == (2, *[2] * (len(buckets.bounds_us) - 1), 1)
    assert read.cumulative()[-1] == ("+Inf", read.total) and read.total == 2 * len(buckets.bounds_us) + 1
    assert read.sum_seconds == pytest.approx(sum(2 * bound + 1 for bound in buckets.bounds_us) / 1e6)
    assert len(set(buckets.words)) == len(read.counts) + 1
