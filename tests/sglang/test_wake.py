"""An idle scheduler is woken by the ledger or a deadline, and left alone otherwise."""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from sglang_kvcached.wake import Waker
from tests.sglang.elastic import IDLE_SECONDS, engine
from tests.sglang.twins import KINDS, Twins

BOUND_MS = 20_000


class Bells:
    """A doorbell that a test rings."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self.closed = False

    def filenos(self) -> list[int]:
        """Return its file descriptor."""
        return [self.read]

    def drain(self) -> None:
        """Empty it."""
        os.read(self.read, 100)

    def ring(self) -> None:
        """Ring it."""
        os.write(self.write, b"!")

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True


def woken(waker: Waker, poller: zmq.Poller) -> bool:
    """Sleep as SGLang's idle loop does, until the waker has rung. One ring may end the sleep twice."""
    give_up_at = time.monotonic() + BOUND_MS / 1000
    while time.monotonic() < give_up_at:
        if poller.poll(BOUND_MS) and waker.take_ring():
            return True
    return False


def test_a_doorbell_wakes_a_scheduler_that_sleeps() -> None:
    bells, poller = Bells(), zmq.Poller()
    waker = Waker(bells, SimpleNamespace(poller=poller))
    waker.start(lambda: None)
    assert poller.poll(0) == [] and not waker.take_ring()
    bells.ring()
    assert woken(waker, poller) and not waker.take_ring()
    assert poller.poll(0) == []
    waker.close()
    waker.close()
    assert bells.closed and poller.sockets == []


def test_the_deadline_wakes_a_scheduler_that_sleeps() -> None:
    bells, poller, deadline, now = Bells(), zmq.Poller(), [0.0], [0.0]
    waker = Waker(bells, SimpleNamespace(poller=poller), lambda: now[0])
    waker.start(lambda: deadline[0] or None)
    assert poller.poll(0) == []
    deadline[0] = now[0] = 5.0
    waker.read_deadline_again()
    assert woken(waker, poller)
    waker.close()


def test_a_scheduler_that_spins_finds_a_flag() -> None:
    bells, rang = Bells(), threading.Event()
    waker = Waker(bells, None)
    waker.start(lambda: None)
    bells.ring()
    for _ in range(BOUND_MS):
        if waker.take_ring():
            rang.set()
            break
        select.select([], [], [], 0.001)
    assert rang.is_set()
    waker.close()


@pytest.fixture
def quiet(tmp_path: Path) -> Any:
    """An engine whose requests have ended and whose memory has settled."""
    with engine(tmp_path, 16) as made:
        twins = Twins(made, KINDS["mha-16"])
        twins.begin(600)
        twins.end(0, keep=True)
        made.idle()
        yield made


def test_an_idle_pass_without_a_ring_does_not_read_the_ledger(
    quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's loop spins: the ledger, the free list and the cache are left alone."""
    assert quiet.memory.settle_idle() == []
    looked: list[str] = []
    for owner, name in (
        (quiet.scheduler_view, "created"),
        (quiet.cache, "evictable_size"),
        (quiet.allocator, "free_tensor"),
    ):
        monkeypatch.setattr(owner, name, lambda name=name: looked.append(name))
    for _ in range(100):
        assert quiet.memory.settle_idle() == []
    assert looked == []


def test_an_idle_engine_shrinks_to_a_lower_limit_when_woken(quiet: Any) -> None:
    before = quiet.held()
    quiet.limit(2)
    quiet.memory._waker = SimpleNamespace(
        take_ring=lambda: True, read_deadline_again=lambda: None, close=lambda: None
    )
    assert quiet.memory.settle_idle() == []
    quiet.turn()
    assert quiet.held() <= 2 < before and not quiet.cache.lent


def test_cached_memory_stays_and_empty_memory_is_given_back_when_idle(tmp_path: Path) -> None:
    with engine(tmp_path, 16) as made:
        twins = Twins(made, KINDS["mha-16"])
        twins.begin(600)
        twins.begin(600)
        twins.end(0, keep=True)
        twins.end(0, keep=False)
        made.idle()
        assert made.memory.governor.deadline == pytest.approx(made.now + IDLE_SECONDS)
        made.idle(IDLE_SECONDS + 0.01)
        assert made.held() == 5 and len(made.cache.lent) == 1
