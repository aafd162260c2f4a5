"""Memory of processes outside the ledger: growth that is a warning, and growth that is not."""

from __future__ import annotations

import logging

import pytest

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.ledger import Runtime
from kvcached_core.ledger.history import read
from tests.ledger.helpers import CAPACITY, GRANULE, attach, leave
from tests.ledger.test_arbiter import Clock

HEADROOM = 2 * GRANULE


def memory(outside: int, held: int = 0) -> MemoryInfo:
    return MemoryInfo(CAPACITY - (outside + held) * GRANULE, CAPACITY)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_lasting_growth_above_the_headroom_is_reported_once(
    runtime: Runtime, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    owner = attach(runtime, "a", headroom_bytes=HEADROOM, clock=clock)
    for seconds, outside in ((0, 1), (1, 3), (1, 20), (1, 20), (1, 20), (1, 21), (9, 22)):
        clock.now += seconds
        owner.lease(GRANULE, memory(outside))
        owner.give_back(owner.leased_bytes)
    (said,) = caplog.messages
    assert "took 19 MiB more of host, 20 MiB in all" in said and "KVCACHED_RUNTIME_DIR" in said
    told = [event.data for event in read(runtime.device("host")) if event.kind == "outside"]
    assert [data["outside_bytes"] for data in told] == [20 * GRANULE]
    leave(owner)


def test_growth_that_ends_within_two_seconds_is_not_reported(
    runtime: Runtime, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """This happens when an engine dies: its slot is free a moment before its memory is."""
    owner = attach(runtime, "a", headroom_bytes=HEADROOM, clock=clock)
    for seconds, outside in ((0, 1), (1, 30), (1.9, 30), (0.2, 1), (5, 30), (1.9, 2)):
        clock.now += seconds
        owner.lease(GRANULE, memory(outside))
        owner.give_back(owner.leased_bytes)
    assert caplog.messages == []
    leave(owner)


def test_a_warning_names_endangered_floors_and_freed_memory_is_no_warning(
    runtime: Runtime, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    owner = attach(runtime, "a", headroom_bytes=HEADROOM, floor_bytes=30 * GRANULE, clock=clock)
    for outside in (0, 50, 50, 0, 0):
        clock.now += 3
        owner.lease(GRANULE, memory(outside))
        owner.give_back(owner.leased_bytes)
    (said,) = caplog.messages
    assert "16 MiB of floors cannot be given back" in said
    told = [event.data["outside_bytes"] for event in read(runtime.device("host")) if event.kind == "outside"]
    assert told == [50 * GRANULE, 0]
    leave(owner)
