"""A line without threads: two nodes, each with its own ledger and clock, and messages that the test moves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Account, Runtime, SchedulerView
from kvcached_core.ledger.remote.agent import NodeAgent
from kvcached_core.ledger.remote.link import NodeLink
from tests.ledger.helpers import attach

AHEAD_SECONDS = 5000.0  # of the far node's clock


class Wire:
    """One way of a line: what was sent and has not arrived."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()


class FakePost:
    """An end of two wires; receive() never waits."""

    def __init__(self, outgoing: Wire, incoming: Wire) -> None:
        self._outgoing, self._incoming = outgoing.messages, incoming.messages

    def send(self, message: bytes) -> None:
        self._outgoing.append(message)

    def receive(self, seconds: float | None = None) -> bytes:
        if not self._incoming:
            raise LedgerError("nothing has come")
        return self._incoming.popleft()

    def interrupt(self) -> None:
        self._incoming.append(b"")


class QueuePost:
    """An end of two queues between threads; a text in them is the reason why the line breaks there."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[bytes | str] = SimpleQueue()
        self.other = self
        self.broken = ""

    def send(self, message: bytes) -> None:
        if self.broken:
            raise LedgerError(self.broken)
        self.other.queue.put(message)

    def receive(self, seconds: float | None = None) -> bytes:
        try:
            message = self.queue.get(timeout=seconds)
        except Empty:
            raise LedgerError(f"nothing within {seconds:g} s") from None
        if isinstance(message, str):
            raise LedgerError(message)
        return message

    def interrupt(self) -> None:
        self.queue.put(b"")


def posts() -> tuple[QueuePost, QueuePost]:
    """Return both ends of a line."""
    home, far = QueuePost(), QueuePost()
    home.other, far.other = far, home
    return home, far


class TwoNodes:
    """Rank 0 at home, rank 1 far away, a granule each; the scheduler's desk over both."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic, name: str = "m") -> None:
        self.runtimes = [Runtime.open(folder / "home"), Runtime.open(folder / "far")]
        self.clocks: list[Callable[[], float]] = [clock, lambda: clock() + AHEAD_SECONDS]
        self._instances = [f"h-{name}", f"f-{name}"]  # as vLLM's processes choose it, on each node another
        self.accounts: list[Account] = [
            attach(self.runtimes[rank], self._instances[rank], rank, name, clock=self.clocks[rank])
            for rank in (0, 1)
        ]
        self.up, self.down = Wire(), Wire()
        self.far = self.new_far_end()
        self.home = NodeLink(FakePost(self.down, self.up), 1, clock)
        self.mirror = self.home.mirrors[1]
        self.desk = SchedulerView.find(self.runtimes[0], self._instances[0], 2, clock, self.home.mirrors)

    def new_far_end(self) -> NodeAgent:
        """Return a far end that begins now."""
        return NodeAgent(
            FakePost(self.up, self.down), self.runtimes[1], self._instances[1], {1}, self.clocks[1]
        )

    def tell_far(self) -> None:
        """Tell the far end what the scheduler has set, with what was under way before."""
        self.down.messages.append(self.home.say())
        while self.down.messages:
            self.far.hear(self.down.messages.popleft())

    def hear_far(self) -> None:
        """Let all that is on its way to the scheduler arrive."""
        while self.up.messages:
            self.home.hear(self.up.messages.popleft())

    def exchange(self) -> None:
        """Tell both sides all there is to know."""
        self.tell_far()
        self.far.look()
        self.hear_far()

    def close(self) -> None:
        """Let the files go; the accounts are the test's."""
        self.home.close()
        self.desk.close()
        self.far.close()
