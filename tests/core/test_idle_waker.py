"""The idle waker wakes an idle engine for a bell or a deadline, once for each, and never otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvcached_core.scheduler.idle_waker import IdleWaker

BOUND_SECONDS = 10.0  # enough for anything that happens at once


class Idle:
    """An idle engine with a bell, a clock that stands still and a deadline."""

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.now = 100.0
        self.deadline: float | None = None
        self.wakes = 0
        self.woken = threading.Event()
        self.drained = 0
        self.waker = IdleWaker([self.bell], self.drain, lambda: self.deadline, self.wake, lambda: self.now)

    def drain(self) -> None:
        """Empty the bell."""
        self.drained += 1
        os.eventfd_read(self.bell)

    def wake(self) -> None:
        """Count the call."""
        self.wakes += 1
        self.woken.set()

    def ring(self) -> None:
        """Make the bell readable."""
        os.eventfd_write(self.bell, 1)


@pytest.fixture
def idle() -> Iterator[Idle]:
    """An engine whose idle waker is stopped at the end, and whose files are closed."""
    engine = Idle()
    yield engine
    engine.waker.stop()
    os.close(engine.bell)


def test_a_bell_wakes_the_engine_and_is_emptied(idle: Idle) -> None:
    idle.ring()
    idle.ring()
    idle.waker.wait_once()
    assert (idle.wakes, idle.drained) == (1, 1)


def test_a_deadline_that_has_passed_wakes_the_engine_once(idle: Idle) -> None:
    idle.deadline = 99.0
    idle.waker.wait_once()
    assert idle.wakes == 1
    idle.waker.read_deadline_again()
    idle.waker.wait_once()
    assert idle.wakes == 1, "the engine was told; it has not moved its deadline yet"
    idle.deadline = 99.5
    idle.waker.read_deadline_again()
    idle.waker.wait_once()
    assert idle.wakes == 2


def test_a_deadline_to_come_does_not_wake_the_engine(idle: Idle) -> None:
    idle.deadline = 100.001
    idle.waker.wait_once()  # one millisecond, and the clock stands still
    assert idle.wakes == 0
    idle.now = 100.001
    idle.waker.wait_once()
    assert idle.wakes == 1


def test_telling_only_makes_it_look_again(idle: Idle) -> None:
    for _ in range(20_000):  # more than the pipe holds: telling never blocks
        idle.waker.read_deadline_again()
    idle.waker.wait_once()
    assert (idle.wakes, idle.drained) == (0, 0)


def test_the_thread_sleeps_until_a_bell_rings(idle: Idle) -> None:
    idle.waker.start()
    idle.ring()
    assert idle.woken.wait(BOUND_SECONDS)
    idle.waker.stop()
    assert idle.wakes == 1


def test_the_thread_learns_of_a_new_deadline(idle: Idle) -> None:
    idle.waker.start()
    idle.deadline = 99.0
    idle.waker.read_deadline_again()
    assert idle.woken.wait(BOUND_SECONDS)
    idle.waker.stop()
    assert idle.wakes == 1


def test_stopping_ends_the_thread_and_may_be_repeated(idle: Idle) -> None:
    idle.waker.start()
    names = {thread.name for thread in threading.enumerate()}
    assert "kvcached-idle-waker" in names
    idle.waker.stop()
    assert "kvcached-idle-waker" not in {thread.name for thread in threading.enumerate()}
    idle.waker.stop()
    idle.waker.read_deadline_again()  # an engine that is ending may still update its budget
