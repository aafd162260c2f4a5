"""Which side rings the other, and when."""

from __future__ import annotations

from kvcached_core.ledger import (
    Runtime,
    SchedulerView,
    set_limit,
)
from tests.ledger.helpers import (
    GRANULE,
    PLENTY,
    attach,
    engine_usage,
    hold,
)
from tests.ledger.test_scheduler_view import rung


def test_the_worker_is_rung_only_when_it_has_to_act(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    rings = []
    for usage in (
        engine_usage(wanted_granules=1),
        engine_usage(wanted_granules=1, used_blocks=4),
        engine_usage(wanted_granules=2),
        engine_usage(wanted_granules=1),
        engine_usage(wanted_granules=1, released_granules=1),
    ):
        view.publish(usage)
        rings.append(rung(account.fileno()))
        account.drain()
    assert rings == [1, 0, 1, 0, 1]


def test_only_a_rank_that_lacks_wanted_memory_is_rung(runtime: Runtime) -> None:
    accounts = [attach(runtime, "a", rank) for rank in range(2)]
    for account, granules in zip(accounts, (5, 3), strict=True):
        hold(account, granules)
    view = SchedulerView.find(runtime, "a", 2)
    rings = []
    for usage in (
        engine_usage(wanted_granules=1),
        engine_usage(wanted_granules=3),  # both ranks hold 3
        engine_usage(wanted_granules=5),  # the second rank lacks two
        engine_usage(wanted_granules=2, released_granules=2),
        engine_usage(wanted_granules=3, released_granules=2),  # the first rank keeps three of five
        engine_usage(wanted_granules=4, released_granules=2),
    ):
        view.publish(usage)
        rings.append([rung(account.fileno()) for account in accounts])
        for account in accounts:
            account.drain()
    assert rings == [[1, 1], [0, 0], [0, 1], [1, 1], [0, 1], [1, 1]]


def test_a_rank_that_lacks_spare_granules_alone_is_not_rung(runtime: Runtime) -> None:
    """A turn of the supply thread costs the engine's loop as much as creating about ten granules."""
    account = attach(runtime, "a")
    hold(account, 5)
    view = SchedulerView.find(runtime, "a", 1)
    rings = []
    for usage in (
        engine_usage(wanted_granules=5, spare_granules=2),
        engine_usage(wanted_granules=7, spare_granules=2),  # five are enough
        engine_usage(wanted_granules=8, spare_granules=2),
        engine_usage(wanted_granules=8, spare_granules=2),
        engine_usage(wanted_granules=8),  # no spare ones within the limit, and the engine needs more
    ):
        view.publish(usage)
        rings.append(rung(account.fileno()))
        account.drain()
        assert account.wanted_bytes == usage.wanted_granules * GRANULE, "whenever it looks it makes them all"
    assert rings == [1, 0, 1, 0, 1]


def test_the_scheduler_is_rung_when_memory_is_ready_or_a_limit_changed(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    hold(account, 1)
    assert rung(*view.filenos()) == 1
    view.drain()
    set_limit(runtime, "m", 4 * GRANULE)
    assert rung(*view.filenos()) == 1 and rung(account.fileno()) == 1
    view.drain()
    account.acknowledge()
    assert rung(*view.filenos()) == 1
    view.drain()
    account.acknowledge()
    assert rung(*view.filenos()) == 0


def test_the_scheduler_is_rung_once_a_promise_is_fulfilled_or_has_failed(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    rings = []

    def note() -> None:
        rings.append(rung(*view.filenos()))
        view.drain()

    assert account.lease(6 * GRANULE, PLENTY) == 6 * GRANULE
    account.created(1)
    note()
    account.created(2)
    note()
    account.created(3)
    note()
    assert account.lease(3 * GRANULE, PLENTY) == 3 * GRANULE
    account.created(1)
    note()
    account.give_back(bytes_never_ready=2 * GRANULE)
    note()
    account.give_back(granules_released=1)
    note()
    assert rings == [0, 0, 1, 0, 1, 0]


def test_ringing_without_a_listener_or_a_thousand_times_over_is_harmless(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 1)  # no scheduler listens yet
    view = SchedulerView.find(runtime, "a", 1)
    for count in range(70_000):  # more than a pipe holds
        view.publish(engine_usage(released_granules=count))
    account.drain()
    assert rung(account.fileno()) == 0
