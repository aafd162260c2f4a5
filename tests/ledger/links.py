"""A link without threads: two nodes, each with its own ledger and clock; the test moves the messages."""

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

AHEAD_SECONDS = 5000.0  # the remote node's clock is ahead of the scheduler's


class Wire:
    """One direction of a link: messages that were sent and have not arrived."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()


class FakeTransport:
    """One side of a link over two wires; receive() never waits."""

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


class QueueTransport:
    """One side of a link over two queues between threads; a text in a queue is a failure there."""

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


def transports() -> tuple[QueueTransport, QueueTransport]:
    """Return the transports of both sides, the link's first."""
    link, agent = QueueTransport(), QueueTransport()
    link.other, agent.other = agent, link
    return link, agent


class TwoNodes:
    """Rank 0 beside the scheduler, rank 1 on another node; the scheduler's view over both."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic, name: str = "m") -> None:
        self.runtimes = [Runtime.open(folder / "local"), Runtime.open(folder / "remote")]
        self.clocks: list[Callable[[], float]] = [clock, lambda: clock() + AHEAD_SECONDS]
        self._instances = [f"h-{name}", f"f-{name}"]  # as vLLM's processes choose it, on each node another
        self.accounts: list[Account] = [
            attach(self.runtimes[rank], self._instances[rank], rank, name, clock=self.clocks[rank])
            for rank in (0, 1)
        ]
        self.up, self.down = Wire(), Wire()
        self.agent = self.new_agent()
        self.link = NodeLink(FakeTransport(self.down, self.up), 1, clock)
        self.remote_slot = self.link.slots[1]
        self.view = SchedulerView.find(self.runtimes[0], self._instances[0], 2, clock, self.link.slots)

    def new_agent(self) -> NodeAgent:
        """Return a new agent."""
        return NodeAgent(
            FakeTransport(self.up, self.down), self.runtimes[1], self._instances[1], {1}, self.clocks[1]
        )

    def send_update(self) -> None:
        """Deliver all messages to the agent, then an update with the fields that the scheduler has set."""
        self.down.messages.append(self.link.next_update())
        while self.down.messages:
            self.agent.handle(self.down.messages.popleft())

    def deliver_reports(self) -> None:
        """Deliver all reports that are on their way to the scheduler."""
        while self.up.messages:
            self.link.handle(self.up.messages.popleft())

    def exchange(self) -> None:
        """Bring both sides up to date."""
        self.send_update()
        self.agent.report_changes()
        self.deliver_reports()

    def close(self) -> None:
        """Close link, view and agent; the test closes the accounts."""
        self.link.close()
        self.view.close()
        self.agent.close()
