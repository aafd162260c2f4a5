"""The scheduler's link to another node, whose ledger it cannot map.

The scheduler works over a `RemoteSlot` for each rank there: a copy of the rank's slot. `NodeLink` keeps the
copies current; its counterpart on the other node is `NodeAgent`. Each side sends all fields that it writes,
the latest values only, so a message may be late, lost or merged with the next. A late `created_granules` is
too low, or it was lowered because the scheduler ordered that (`created_most`) and no longer uses those
granules. So held = min over ranks(created) - released stays true (I5).

An update to the agent is {n, now_ms, ranks: {rank: {engine's fields, rings}}}. The agent acknowledges each
update with a report: {n of the latest update, now_ms, ranks: {rank: {REPORTED fields, geometry}}}. It sends a
report also when those fields change. {failed: reason}, or an empty message, is the last one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.layout import ENGINE_WORDS, SLOT_WORDS, WORD
from kvcached_core.ledger.slots import Slot, SlotGeometry

_log = logging.getLogger(__name__)

# The fields that a scheduler reads, in this order: created and released rise together when an engine sleeps.
# The field that is written first is read first, so that held is too low rather than too high.
REPORTED = (
    "created_granules", "released_granules", "demand_bytes", "coming_bytes", "target_bytes", "must_bytes",
    "asked_until_ms", "limit_applied", "limit_wanted",
)  # fmt: skip
UPDATE_SECONDS = 0.02  # changes that ring no doorbell are sent this often at most
FIRST_REPORT_SECONDS = 60.0  # an agent starts before the scheduler is made
WARN_SECONDS, ACKNOWLEDGE_SECONDS = 10, 60  # without an acknowledgement: a warning, then the engine ends
JOIN_SECONDS = 5.0


class Transport(Protocol):
    """Carries messages both ways, each once and in order, for one sender and one receiver.

    Every method raises LedgerError if the other side cannot be reached.
    """

    def send(self, message: bytes) -> None:
        """Send without waiting for the other side."""

    def receive(self, seconds: float | None = None) -> bytes:
        """Return the next message, waiting at most `seconds`, or for ever; an empty message is the last."""

    def interrupt(self) -> None:
        """Make this side's receive() return an empty message."""


class SlotReport(NamedTuple):
    """The fields of one rank's slot, read at `sent_ms` by the clock of its node."""

    fields: Mapping[str, int]
    sent_ms: int


class _RemoteBell:
    """Rings a worker on another node: the agent rings whenever the count of rings has changed."""

    def __init__(self, schedule_update: Callable[[bool], None]) -> None:
        self._schedule_update = schedule_update
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1
        self._schedule_update(True)

    def close(self) -> None:
        """Do nothing: no file is open."""


class RemoteSlot(Slot):
    """A copy of the slot of a rank on another node. Only deliver() may be called from another thread."""

    ringer: _RemoteBell

    def __init__(self, link: NodeLink, rank: int, fields: Mapping[str, int]) -> None:
        geometry = SlotGeometry(*(fields[name] for name in SlotGeometry._fields))
        super().__init__(memoryview(array("Q", bytes(WORD * SLOT_WORDS))), 0, rank, geometry)
        self._link = link
        self._inbox: deque[SlotReport] = deque(maxlen=1)  # appending replaces the old report atomically
        self._latest: Mapping[str, int] = {}
        self.ringer = _RemoteBell(link.schedule_update)
        self.bell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def deliver(self, report: SlotReport) -> None:
        """Leave a report to the scheduler; ring it if the fields have changed."""
        self._inbox.append(report)
        if report.fields != self._latest:
            self._latest = report.fields
            self.ring_scheduler()

    def ring_scheduler(self) -> None:
        os.eventfd_write(self.bell_fd, 1)

    def update(self) -> dict[str, int]:
        """Return the fields to send to the agent."""
        return {name: self.words[self.at[name]] for name in ENGINE_WORDS} | {"rings": self.ringer.rings}

    def set(self, name: str, value: int) -> None:
        at = self.at[name]
        if self.words[at] != value:
            self.words[at] = value
            self._link.schedule_update(False)

    def is_there(self) -> bool:
        """Apply the latest report. Raises LedgerError if the link has failed."""
        if self._inbox:
            self._apply(self._inbox.popleft())
        if self._link.failure:
            raise LedgerError(f"rank {self.rank} cannot be reached any more: {self._link.failure}")
        return True

    def _apply(self, report: SlotReport) -> None:
        for name in REPORTED:
            self.words[self.at[name]] = report.fields[name]
        if until_ms := report.fields["asked_until_ms"]:
            self.words[self.asked_until_at] = self._link.now_ms() + max(0, until_ms - report.sent_ms)

    def close(self, keep_bell: bool = False) -> None:
        if self.bell_fd >= 0 and not keep_bell:
            os.close(self.bell_fd)
            self.bell_fd = -1


class NodeLink:
    """Keeps the slots of one other node's ranks current, and sends the node the fields that are set in them.

    `failure` is the reason once no more reports can come. Close the link before its slots.
    """

    def __init__(
        self,
        transport: Transport,
        node: int,
        clock: Callable[[], float],
        first_report_seconds: float = FIRST_REPORT_SECONDS,
        acknowledge_seconds: int = ACKNOWLEDGE_SECONDS,
    ) -> None:
        """Wait for the node's first report; raises LedgerError naming the node if it does not come."""
        self._transport, self._node, self._clock = transport, node, clock
        self._acknowledge_seconds = acknowledge_seconds
        self.failure = ""
        self._closed = False
        self._sent = 0  # the number of the latest update
        self._changed, self._urgent = threading.Event(), threading.Event()
        self._acknowledged = threading.Event()
        self.slots: dict[int, RemoteSlot] = {}
        try:
            self.handle(transport.receive(first_report_seconds))
        except LedgerError as error:
            raise LedgerError(f"node {node} does not report its memory: {error}") from error
        if self.failure:
            raise LedgerError(self.failure)
        self._threads = [
            threading.Thread(target=run, name="kvcached-link", daemon=True)
            for run in (self._receive, self._send)
        ]

    def start(self) -> None:
        """Start to exchange messages."""
        for thread in self._threads:
            thread.start()

    def schedule_update(self, urgent: bool) -> None:
        """Schedule a message with the changed fields: now if `urgent`, else within UPDATE_SECONDS."""
        if not self._changed.is_set():
            self._changed.set()
        if urgent:
            self._urgent.set()

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    def handle(self, message: bytes) -> bool:
        """Take in a message of the agent; return whether more may come."""
        report: dict[str, Any] = json.loads(message or b'{"failed": "its worker has ended"}')
        if "failed" in report:
            self._fail(f"node {self._node}: {report['failed']}")
            return False
        for rank, fields in report["ranks"].items():
            if int(rank) not in self.slots:
                self.slots[int(rank)] = RemoteSlot(self, int(rank), fields)
            self.slots[int(rank)].deliver(SlotReport(fields, report["now_ms"]))
        if report["n"] == self._sent:
            self._acknowledged.set()
        return True

    def next_update(self) -> bytes:
        """Return the next message to the agent."""
        self._acknowledged.clear()
        self._sent += 1
        ranks = {rank: slot.update() for rank, slot in self.slots.items()}
        return json.dumps({"n": self._sent, "now_ms": self.now_ms(), "ranks": ranks}).encode()

    def close(self) -> None:
        """End the exchange; may be repeated."""
        if self._closed:
            return
        self._closed = True
        self.schedule_update(True)
        self._acknowledged.set()
        if self._threads[0].is_alive():
            with contextlib.suppress(LedgerError):
                self._transport.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_SECONDS)

    def _receive(self) -> None:
        try:
            while self.handle(self._transport.receive()) and not self._closed:
                pass
        except Exception as error:
            self._fail(f"the link to node {self._node} is broken: {error}")

    def _send(self) -> None:
        try:
            while not (self._closed or self.failure):
                self._changed.wait()
                self._urgent.wait(UPDATE_SECONDS)
                self._changed.clear()  # before the fields are read: later changes go with the next update
                self._urgent.clear()
                if not self._closed:
                    self._transport.send(self.next_update())
                    self._wait_for_acknowledgement()
        except Exception as error:
            self._fail(f"the link to node {self._node} is broken: {error}")

    def _wait_for_acknowledgement(self) -> None:
        """Wait a second at a time: time in which this process was stopped counts as one second at most."""
        for second in range(self._acknowledge_seconds):
            if self._acknowledged.wait(1.0) or self._closed or self.failure:
                return
            if second == WARN_SECONDS:
                _log.warning(
                    "kvcached: node %d has not answered for %d s; this engine ends after %d s",
                    self._node, second, self._acknowledge_seconds,
                )  # fmt: skip
        self._fail(f"node {self._node} has not answered for {self._acknowledge_seconds} s")

    def _fail(self, reason: str) -> None:
        """Note why no more reports can come, and ring an idle scheduler, which then ends the engine."""
        if self._closed or self.failure:
            return
        self.failure = reason
        self._acknowledged.set()
        self.schedule_update(True)
        for slot in self.slots.values():
            slot.ring_scheduler()
