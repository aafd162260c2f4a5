"""A link between a scheduler and the ranks of another node: messages that arrive, doorbells that ring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Runtime, set_limit
from tests.ledger.helpers import GRANULE, PLENTY, attach, die, engine_usage, hold, picture, readable
from tests.ledger.links import AHEAD_SECONDS, TwoNodes


class Clock:
    """A clock that the test moves."""

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


def test_the_scheduler_sees_a_remote_rank_as_last_reported(nodes: TwoNodes) -> None:
    local, remote = nodes.accounts
    hold(local, 4)
    hold(remote, 2)
    assert nodes.view.created() == 1, "not reported yet"
    nodes.exchange()
    assert nodes.view.created() == 3
    assert nodes.view.geometry[0] == nodes.view.geometry[1]
    set_limit(nodes.runtimes[1], "m", 5 * GRANULE)
    remote.lease(100 * GRANULE, PLENTY)
    nodes.exchange()
    assert nodes.view.granule_limit() == 5 and nodes.view.refused()
    remote.acknowledge()
    set_limit(nodes.runtimes[1], "m", 7 * GRANULE)
    nodes.exchange()
    assert nodes.view.granule_limit() == 5, "a higher one when it is applied"
    remote.acknowledge()
    nodes.exchange()
    assert nodes.view.granule_limit() == 7


def test_usage_that_is_published_is_written_into_the_remote_ledger(nodes: TwoNodes, clock: Clock) -> None:
    nodes.view.publish(engine_usage(8, 5, 3, needed_granules=4, wanted_granules=6, released_granules=0))
    nodes.view.count(evictions=4, preemptions=1, busy=False, idle_since_ms=99_000)
    nodes.exchange()
    (local,), (remote,) = (picture(runtime).owners for runtime in nodes.runtimes)
    names = ("used_bytes", "cached_bytes", "stranded_bytes", "needed_bytes", "wanted_bytes", "evictions",
             "preemptions", "busy", "ordered_granules")  # fmt: skip
    assert [getattr(local, name) for name in names] == [getattr(remote, name) for name in names]
    assert (local.idle_since_ms, remote.idle_since_ms) == (99_000, 99_000 + AHEAD_SECONDS * 1000)


def test_a_reclaim_from_a_remote_rank_lapses_by_its_own_clock(nodes: TwoNodes, clock: Clock) -> None:
    slot = nodes.accounts[1]._slot
    slot.set("target_bytes", 3 * GRANULE)
    slot.set("asked_until_ms", int((nodes.clocks[1]() + 1) * 1000))
    nodes.exchange()
    assert nodes.view.target_granules() == 3
    clock.now += 0.9
    assert nodes.view.target_granules() == 3
    clock.now += 0.1
    assert nodes.view.target_granules() == 0
    nodes.exchange()
    assert nodes.view.target_granules() == 0, "reported again, and as late"


def test_a_remote_worker_is_rung_once_for_what_rings_a_local_one_though_a_message_is_lost(
    nodes: TwoNodes,
) -> None:
    remote = nodes.accounts[1]
    remote.drain()
    nodes.view.publish(engine_usage(wanted_granules=2))
    nodes.link.next_update()  # and it is lost
    nodes.send_update()
    assert readable(remote.fileno()) == 1
    remote.drain()
    nodes.view.publish(engine_usage(wanted_granules=2, used_blocks=1))
    nodes.send_update()
    assert readable(remote.fileno()) == 0


def test_the_scheduler_is_rung_by_changes_and_not_by_acknowledgements(nodes: TwoNodes) -> None:
    nodes.view.drain()
    nodes.view.publish(engine_usage(used_blocks=1))
    nodes.exchange()
    assert readable(nodes.remote_slot.bell_fd) == 0
    hold(nodes.accounts[1], 1)
    nodes.exchange()
    assert readable(nodes.remote_slot.bell_fd) == 1
    nodes.view.drain()
    assert readable(*nodes.view.filenos()) == 0


def test_i5_an_order_to_withdraw_holds_until_the_remote_rank_has_done_it(nodes: TwoNodes) -> None:
    local, remote = nodes.accounts
    hold(remote, 4)
    hold(local, 2)
    nodes.exchange()
    nodes.view.publish(engine_usage(wanted_granules=1))
    nodes.exchange()
    assert remote.created_most == 3
    hold(local, 5)
    assert nodes.view.created() == 3, "granules that are to go are not counted any more"
    remote.give_back(granules_withdrawn=2)
    assert nodes.view.created() == 3
    nodes.exchange()
    assert nodes.view.created() == 3
    remote.drain()
    nodes.exchange()
    assert remote.created_most == 0 and readable(remote.fileno()) == 1, "it may grow again"


def test_a_remote_ledger_that_is_written_anew_has_the_fields_of_the_scheduler(nodes: TwoNodes) -> None:
    nodes.view.publish(engine_usage(wanted_granules=6))
    nodes.exchange()
    remote = nodes.accounts[1]
    folder = nodes.runtimes[1].device(remote.device.uuid)
    os.truncate(folder.ledger, 100)
    nodes.agent.report_changes()
    assert not nodes.up.messages, "the file is being made again"
    nodes.send_update()
    nodes.deliver_reports()
    assert nodes.view.created() == 1, "and until then the remote rank has what it had"
    remote.acknowledge()
    hold(remote, 1)
    nodes.exchange()
    assert remote.wanted_bytes == 6 * GRANULE
    hold(nodes.accounts[0], 1)
    assert nodes.view.created() == 2


def test_a_remote_rank_that_has_ended_is_an_error_that_names_it(nodes: TwoNodes) -> None:
    die(nodes.accounts[1])
    attach(nodes.runtimes[1], "next", name="next")  # takes the slot
    with pytest.raises(LedgerError, match="instance f-m with rank 1"):
        nodes.agent.report_changes()


def test_two_engines_each_ahead_on_another_node_do_not_wait_for_each_other(
    runtime: Runtime, tmp_path: Path
) -> None:
    engines = [TwoNodes(tmp_path, name=name) for name in ("a", "b")]
    for number, engine in enumerate(engines):
        hold(engine.accounts[number], 60)
        hold(engine.accounts[1 - number], 2)
        engine.exchange()
        assert engine.view.created() == 2
        engine.view.count(0, 0, busy=True, idle_since_ms=0)
        engine.view.publish(engine_usage(used_blocks=8, needed_granules=50, wanted_granules=50))
    for _ in range(6):
        for engine in engines:
            for account in engine.accounts:
                most, created = account.created_most, account._own["created_granules"]
                account.give_back(granules_withdrawn=max(0, created - most) if most else 0)
                missing = account.wanted_bytes - account.leased_bytes
                if missing > 0 and not most:
                    account.created(account.lease(missing, PLENTY) // GRANULE)
            engine.exchange()
            engine.view.target_granules()
            engine.view.created()
            engine.exchange()
    assert [engine.view.created() for engine in engines] == [32, 32]
    for engine in engines:
        engine.close()
