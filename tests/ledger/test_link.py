"""A line between a scheduler and the ranks of another node: what arrives, and what is rung."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Runtime, set_limit
from tests.ledger.helpers import GRANULE, PLENTY, Usage, attach, die, hold, picture, readable
from tests.ledger.links import AHEAD_SECONDS, TwoNodes


class Clock:
    """Moves when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nodes(runtime: Runtime, tmp_path: Path, clock: Clock) -> Iterator[TwoNodes]:
    """Return an engine on two nodes; `runtime` closes its accounts."""
    both = TwoNodes(tmp_path, clock)
    for account in both.accounts:
        hold(account, 1)
    both.exchange()
    yield both
    both.close()


def test_the_scheduler_sees_a_far_rank_as_last_heard_of(nodes: TwoNodes) -> None:
    near, far = nodes.accounts
    hold(near, 4)
    hold(far, 2)
    assert nodes.desk.created() == 1, "not heard of yet"
    nodes.exchange()
    assert nodes.desk.created() == 3
    assert nodes.desk.geometry[0] == nodes.desk.geometry[1]
    set_limit(nodes.runtimes[1], "m", 5 * GRANULE)
    far.lease(100 * GRANULE, PLENTY)
    nodes.exchange()
    assert nodes.desk.granule_limit() == 5 and nodes.desk.refused()
    far.acknowledge()
    set_limit(nodes.runtimes[1], "m", 7 * GRANULE)
    nodes.exchange()
    assert nodes.desk.granule_limit() == 5, "a higher one when it is applied"
    far.acknowledge()
    nodes.exchange()
    assert nodes.desk.granule_limit() == 7


def test_what_the_scheduler_publishes_stands_in_the_far_ledger(nodes: TwoNodes, clock: Clock) -> None:
    nodes.desk.publish(Usage(8, 5, 3, needed_granules=4, wanted_granules=6, released_granules=0))
    nodes.desk.count(evictions=4, preemptions=1, busy=False, idle_since_ms=99_000)
    nodes.exchange()
    (near,), (far,) = (picture(runtime).owners for runtime in nodes.runtimes)
    names = ("used_bytes", "cached_bytes", "stranded_bytes", "needed_bytes", "wanted_bytes", "evictions",
             "preemptions", "busy", "ordered_granules")  # fmt: skip
    assert [getattr(near, name) for name in names] == [getattr(far, name) for name in names]
    assert (near.idle_since_ms, far.idle_since_ms) == (99_000, 99_000 + AHEAD_SECONDS * 1000)


def test_what_is_asked_of_a_far_rank_lapses_by_its_own_clock(nodes: TwoNodes, clock: Clock) -> None:
    seat = nodes.accounts[1]._seat
    seat.set("target_bytes", 3 * GRANULE)
    seat.set("asked_until_ms", int((nodes.clocks[1]() + 1) * 1000))
    nodes.exchange()
    assert nodes.desk.target_granules() == 3
    clock.now += 0.9
    assert nodes.desk.target_granules() == 3
    clock.now += 0.1
    assert nodes.desk.target_granules() == 0
    nodes.exchange()
    assert nodes.desk.target_granules() == 0, "told again, and as late"


def test_a_far_worker_is_rung_once_for_what_rings_a_near_one_though_a_message_is_lost(
    nodes: TwoNodes,
) -> None:
    far = nodes.accounts[1]
    far.drain()
    nodes.desk.publish(Usage(wanted_granules=2))
    nodes.home.say()  # and it is lost
    nodes.tell_far()
    assert readable(far.fileno()) == 1
    far.drain()
    nodes.desk.publish(Usage(wanted_granules=2, used_blocks=1))
    nodes.tell_far()
    assert readable(far.fileno()) == 0


def test_the_scheduler_is_rung_by_news_and_not_by_answers(nodes: TwoNodes) -> None:
    nodes.desk.drain()
    nodes.desk.publish(Usage(used_blocks=1))
    nodes.exchange()
    assert readable(nodes.mirror.bell_fd) == 0
    hold(nodes.accounts[1], 1)
    nodes.exchange()
    assert readable(nodes.mirror.bell_fd) == 1
    nodes.desk.drain()
    assert readable(*nodes.desk.filenos()) == 0


def test_i5_an_order_to_withdraw_holds_until_the_far_rank_has_done_it(nodes: TwoNodes) -> None:
    near, far = nodes.accounts
    hold(far, 4)
    hold(near, 2)
    nodes.exchange()
    nodes.desk.publish(Usage(wanted_granules=1))
    nodes.exchange()
    assert far.created_most == 3
    hold(near, 5)
    assert nodes.desk.created() == 3, "what is to go is not counted on any more"
    far.give_back(granules_withdrawn=2)
    assert nodes.desk.created() == 3
    nodes.exchange()
    assert nodes.desk.created() == 3
    far.drain()
    nodes.exchange()
    assert far.created_most == 0 and readable(far.fileno()) == 1, "it may grow again"


def test_a_far_ledger_that_is_written_anew_has_the_words_of_the_scheduler(nodes: TwoNodes) -> None:
    nodes.desk.publish(Usage(wanted_granules=6))
    nodes.exchange()
    far = nodes.accounts[1]
    folder = nodes.runtimes[1].device(far.device.uuid)
    os.truncate(folder.ledger, 100)
    nodes.far.look()
    assert not nodes.up.messages, "the file is being made again"
    nodes.tell_far()
    nodes.hear_far()
    assert nodes.desk.created() == 1, "and until then the far rank has what it had"
    far.acknowledge()
    hold(far, 1)
    nodes.exchange()
    assert far.wanted_bytes == 6 * GRANULE
    hold(nodes.accounts[0], 1)
    assert nodes.desk.created() == 2


def test_a_far_rank_that_has_ended_is_an_error_that_names_it(nodes: TwoNodes) -> None:
    die(nodes.accounts[1])
    attach(nodes.runtimes[1], "next", name="next")  # takes the slot
    with pytest.raises(LedgerError, match="instance f-m with rank 1"):
        nodes.far.look()


def test_two_engines_that_each_came_far_on_one_of_two_nodes_do_not_wait_for_each_other(
    runtime: Runtime, tmp_path: Path
) -> None:
    engines = [TwoNodes(tmp_path, name=name) for name in ("a", "b")]
    for number, engine in enumerate(engines):
        hold(engine.accounts[number], 60)
        hold(engine.accounts[1 - number], 2)
        engine.exchange()
        assert engine.desk.created() == 2
        engine.desk.count(0, 0, busy=True, idle_since_ms=0)
        engine.desk.publish(Usage(used_blocks=8, needed_granules=50, wanted_granules=50))
    for _ in range(6):
        for engine in engines:
            for account in engine.accounts:
                most, created = account.created_most, account._own["created_granules"]
                account.give_back(granules_withdrawn=max(0, created - most) if most else 0)
                missing = account.wanted_bytes - account.leased_bytes
                if missing > 0 and not most:
                    account.created(account.lease(missing, PLENTY) // GRANULE)
            engine.exchange()
            engine.desk.target_granules()
            engine.desk.created()
            engine.exchange()
    assert [engine.desk.created() for engine in engines] == [32, 32]
    for engine in engines:
        engine.close()
