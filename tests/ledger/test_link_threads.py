"""A link at work on its threads: the messages over it, and how it ends."""

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
from tests.ledger.helpers import GRANULE, attach, die, engine_usage, hold, readable
from tests.ledger.links import QueueTransport, transports

BOUND_SECONDS = 20.0


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds: the link's threads make it true."""
    give_up_at = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < give_up_at
        os.sched_yield()


class RunningLink:
    """Both sides of a link, with their threads running."""

    def __init__(self, folder: Path, acknowledge_seconds: int = 60) -> None:
        self.runtimes = [Runtime.open(folder / "local"), Runtime.open(folder / "remote")]
        self.local = attach(self.runtimes[0], "h", 0)
        self.account = attach(self.runtimes[1], "f", 1)
        for account in (self.local, self.account):
            hold(account, 1)
        self.link_transport, self.agent_transport = transports()
        self.agent = NodeAgent(self.agent_transport, self.runtimes[1], "f", {1}, time.monotonic)
        self.link = NodeLink(self.link_transport, 1, time.monotonic, acknowledge_seconds=acknowledge_seconds)
        self.view = SchedulerView.find(self.runtimes[0], "h", 2, remote_slots=self.link.slots)
        self.agent.start()
        self.link.start()

    def close(self) -> None:
        self.link.close()
        self.link.close()
        self.view.close()
        self.agent.close()
        self.agent.close()
        assert not any(thread.is_alive() for thread in (*self.link._threads, *self.agent._threads))

    def want_more(self) -> None:
        """Publish a new usage; the link may fail during the call."""
        with contextlib.suppress(LedgerError):
            self.view.publish(engine_usage(wanted_granules=2))

    def ends_with(self, sentence: str) -> None:
        """Check that an idle scheduler is rung, and that its next call raises this error."""
        assert readable(self.link.slots[1].bell_fd, seconds=BOUND_SECONDS) == 1
        until(lambda: bool(self.link.failure))
        for call in (self.view.created, self.view.released, lambda: self.view.publish(engine_usage())):
            with pytest.raises(LedgerError, match=f"rank 1 cannot be reached any more: .*{sentence}"):
                call()


@contextlib.contextmanager
def running_link(folder: Path, acknowledge_seconds: int = 60) -> Iterator[RunningLink]:
    both = RunningLink(folder, acknowledge_seconds)
    try:
        yield both
    finally:
        both.close()


def test_memory_comes_and_goes_over_a_link_and_bells_ring_on_both_sides(
    runtime: Runtime, tmp_path: Path
) -> None:
    with running_link(tmp_path) as both:
        for granules in range(2, 6):
            both.account.drain()
            both.view.publish(engine_usage(wanted_granules=granules))
            assert readable(both.account.fileno(), seconds=BOUND_SECONDS) == 1
            assert both.account.wanted_bytes == granules * GRANULE
            hold(both.local, 1)
            both.view.drain()
            hold(both.account, 1)
            until(lambda: both.view.created() == granules)  # noqa: B023
            assert readable(both.link.slots[1].bell_fd, seconds=BOUND_SECONDS) == 1
        both.view.count(0, 0, busy=True, idle_since_ms=0)
        until(lambda: both.account._slot.get("busy") == 1)
        both.account._slot.set("target_bytes", GRANULE)  # rings no doorbell
        both.account._slot.set("asked_until_ms", 1 << 50)
        until(lambda: both.view.target_granules() == 1)


def test_an_agent_that_is_closed_ends_the_engine(runtime: Runtime, tmp_path: Path) -> None:
    with running_link(tmp_path) as both:
        both.view.drain()
        both.agent.close()
        both.ends_with("node 1: its worker has ended")


def test_a_remote_rank_that_ends_ends_the_engine_by_its_sentence(runtime: Runtime, tmp_path: Path) -> None:
    with running_link(tmp_path) as both:
        both.view.drain()
        die(both.account)
        attach(both.runtimes[1], "next", name="next")
        both.want_more()
        both.ends_with("node 1: no living worker of instance f with rank 1")


@pytest.mark.parametrize("end", ["receive", "send"])
def test_a_link_that_breaks_ends_the_engine(end: str, runtime: Runtime, tmp_path: Path) -> None:
    with running_link(tmp_path) as both:
        both.view.drain()
        if end == "receive":
            both.link_transport.queue.put("connection reset")
        else:
            both.link_transport.broken = "connection reset"
            both.want_more()
        both.ends_with("the link to node 1 is broken: connection reset")


def test_a_node_that_does_not_answer_ends_the_engine(runtime: Runtime, tmp_path: Path) -> None:
    with running_link(tmp_path, acknowledge_seconds=1) as both:
        both.agent_transport.other = QueueTransport()  # its messages are lost from now on
        both.view.drain()
        both.want_more()
        both.ends_with("node 1 has not answered for 1 s")


def test_an_agent_without_its_scheduler_says_so_and_stays(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), running_link(tmp_path) as both:
        both.agent_transport.queue.put("the store has gone")
        until(lambda: not both.agent._threads[0].is_alive())
        assert "scheduler of these ranks cannot be reached any more: the store has gone" in caplog.text
        both.ends_with("the store has gone")


def test_a_node_that_never_reports_is_named(tmp_path: Path) -> None:
    transport, _ = transports()
    with pytest.raises(LedgerError, match=r"node 3 does not report its memory: nothing within 0\.01 s"):
        NodeLink(transport, 3, time.monotonic, first_report_seconds=0.01)
    transport.queue.put(json.dumps({"failed": "no room"}).encode())
    with pytest.raises(LedgerError, match="node 3: no room"):
        NodeLink(transport, 3, time.monotonic)


def test_a_link_leaves_no_descriptor_open(runtime: Runtime, tmp_path: Path) -> None:
    before = None
    for _ in range(3):
        with running_link(tmp_path) as both:
            pass
        die(both.local)
        die(both.account)
        now = len(os.listdir("/proc/self/fd"))
        assert before in (None, now)
        before = now
