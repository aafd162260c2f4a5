"""A line at work on its threads: what comes and goes over it, and how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Runtime, SchedulerView
from kvcached_core.ledger.remote.agent import NodeAgent
from kvcached_core.ledger.remote.link import NodeLink
from tests.ledger.helpers import GRANULE, Usage, attach, die, hold, readable
from tests.ledger.links import QueuePost, posts

BOUND_SECONDS = 20.0


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; threads are at work."""
    give_up_at = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < give_up_at
        os.sched_yield()


class Line:
    """Both ends at work."""

    def __init__(self, folder: Path, silence_seconds: int = 60) -> None:
        self.runtimes = [Runtime.open(folder / "home"), Runtime.open(folder / "far")]
        self.near = attach(self.runtimes[0], "h", 0)
        self.account = attach(self.runtimes[1], "f", 1)
        for account in (self.near, self.account):
            hold(account, 1)
        self.home_post, self.far_post = posts()
        self.far = NodeAgent(self.far_post, self.runtimes[1], "f", {1}, time.monotonic)
        self.home = NodeLink(self.home_post, 1, time.monotonic, silence_seconds=silence_seconds)
        self.desk = SchedulerView.find(self.runtimes[0], "h", 2, elsewhere=self.home.mirrors)
        self.far.start()
        self.home.start()

    def close(self) -> None:
        self.home.close()
        self.home.close()
        self.desk.close()
        self.far.close()
        self.far.close()
        assert not any(thread.is_alive() for thread in (*self.home._threads, *self.far._threads))

    def want_more(self) -> None:
        """Publish something; the line may be known to have ended before that returns."""
        with contextlib.suppress(LedgerError):
            self.desk.publish(Usage(wanted_granules=2))

    def ends_with(self, sentence: str) -> None:
        """Expect an idle scheduler to be rung, and what it hears when it looks."""
        assert readable(self.home.mirrors[1].bell_fd, seconds=BOUND_SECONDS) == 1
        until(lambda: bool(self.home.lost))
        for call in (self.desk.created, self.desk.released, lambda: self.desk.publish(Usage())):
            with pytest.raises(LedgerError, match=f"rank 1 cannot be reached any more: .*{sentence}"):
                call()


@contextlib.contextmanager
def line(folder: Path, silence_seconds: int = 60) -> Iterator[Line]:
    both = Line(folder, silence_seconds)
    try:
        yield both
    finally:
        both.close()


def test_memory_comes_and_goes_over_a_line_and_bells_ring_at_both_ends(
    runtime: Runtime, tmp_path: Path
) -> None:
    with line(tmp_path) as both:
        for granules in range(2, 6):
            both.account.drain()
            both.desk.publish(Usage(wanted_granules=granules))
            assert readable(both.account.fileno(), seconds=BOUND_SECONDS) == 1
            assert both.account.wanted_bytes == granules * GRANULE
            hold(both.near, 1)
            both.desk.drain()
            hold(both.account, 1)
            until(lambda: both.desk.created() == granules)  # noqa: B023
            assert readable(both.home.mirrors[1].bell_fd, seconds=BOUND_SECONDS) == 1
        both.desk.count(0, 0, busy=True, idle_since_ms=0)
        until(lambda: both.account._seat.get("busy") == 1)
        both.account._seat.set("target_bytes", GRANULE)  # rings nobody
        both.account._seat.set("asked_until_ms", 1 << 50)
        until(lambda: both.desk.target_granules() == 1)


def test_a_far_end_that_is_closed_ends_the_engine(runtime: Runtime, tmp_path: Path) -> None:
    with line(tmp_path) as both:
        both.desk.drain()
        both.far.close()
        both.ends_with("node 1: it has ended")


def test_a_far_rank_that_ends_ends_the_engine_by_its_sentence(runtime: Runtime, tmp_path: Path) -> None:
    with line(tmp_path) as both:
        both.desk.drain()
        die(both.account)
        attach(both.runtimes[1], "next", name="next")
        both.want_more()
        both.ends_with("node 1: no living worker of instance f with rank 1")


@pytest.mark.parametrize("end", ["receive", "send"])
def test_a_line_that_breaks_ends_the_engine(end: str, runtime: Runtime, tmp_path: Path) -> None:
    with line(tmp_path) as both:
        both.desk.drain()
        if end == "receive":
            both.home_post.queue.put("connection reset")
        else:
            both.home_post.broken = "connection reset"
            both.want_more()
        both.ends_with("the line to node 1 is broken: connection reset")


def test_a_node_that_does_not_answer_ends_the_engine(runtime: Runtime, tmp_path: Path) -> None:
    with line(tmp_path, silence_seconds=1) as both:
        both.far_post.other = QueuePost()  # what it sends is lost from now on
        both.desk.drain()
        both.want_more()
        both.ends_with("node 1 has not answered for 1 s")


def test_a_far_end_without_its_scheduler_says_so_and_stays(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), line(tmp_path) as both:
        both.far_post.queue.put("the store has gone")
        until(lambda: not both.far._threads[0].is_alive())
        assert "scheduler of these ranks cannot be reached any more: the store has gone" in caplog.text
        both.ends_with("the store has gone")


def test_a_node_that_never_speaks_is_named(tmp_path: Path) -> None:
    home, _ = posts()
    with pytest.raises(LedgerError, match=r"node 3 does not tell of its memory: nothing within 0\.01 s"):
        NodeLink(home, 3, time.monotonic, first_seconds=0.01)
    home.queue.put(json.dumps({"failed": "no room"}).encode())
    with pytest.raises(LedgerError, match="node 3: no room"):
        NodeLink(home, 3, time.monotonic)


def test_a_line_leaves_no_descriptor_open(runtime: Runtime, tmp_path: Path) -> None:
    before = None
    for _ in range(3):
        with line(tmp_path) as both:
            pass
        die(both.near)
        die(both.account)
        now = len(os.listdir("/proc/self/fd"))
        assert before in (None, now)
        before = now
