"""The agent of a scheduler on another node: it reads and writes slots there as the scheduler would.

`NodeLink` is its counterpart; the messages are described in `link`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import threading
from collections.abc import Callable
from typing import Any

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.doorbells import drain_bell
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.remote.link import JOIN_SECONDS, REPORTED, UPDATE_SECONDS, Transport
from kvcached_core.ledger.slots import Slot, SlotGeometry, find_slots, replace_moved_slots

_log = logging.getLogger(__name__)

Fields = dict[str, int]


class NodeAgent:
    """Reports the slots of this node's ranks to the scheduler, and writes the scheduler's updates into them.

    Runs in one of the node's workers, on two threads: one receives updates, the other sleeps on the engine's
    doorbells and sends reports.
    """

    def __init__(self, transport: Transport, runtime: Runtime, instance: str, ranks: set[int],
                 clock: Callable[[], float]) -> None:  # fmt: skip
        """Find the slots and send a first report. Raises LedgerError naming the ranks that were not found."""
        self._transport, self._runtime, self._instance, self._clock = transport, runtime, instance, clock
        self._slots: list[Slot] = list(find_slots(runtime, instance, ranks).values())
        self._received: dict[int, Fields] = {}  # the latest update, by rank
        self._reported: dict[int, Fields] = {}  # the latest report, by rank
        self._acknowledged = 0  # the number of the latest update
        self._clock_offset_ms = 0  # this node's clock minus the scheduler's
        self._ended = False
        self._mutex = threading.Lock()  # guards the slots, and keeps reports in the order of their reading
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name="kvcached-link", daemon=True)
            for run in (self._receive, self._watch)
        ]
        self.report_changes()

    def start(self) -> None:
        """Start to exchange messages."""
        for thread in self._threads:
            thread.start()

    def report_changes(self) -> None:
        """Send a report if a field has changed. Raises LedgerError if a slot or the link is gone."""
        with self._mutex:
            if self._read_slots():
                self._send_report()

    def handle(self, message: bytes) -> bool:
        """Write an update into the slots and acknowledge it; return whether more may come.

        Raises LedgerError if a slot or the link is gone.
        """
        if not message:
            return False
        update: dict[str, Any] = json.loads(message)
        with self._mutex:
            self._clock_offset_ms = self._now_ms() - update["now_ms"]
            before = self._received
            self._received = {int(rank): fields for rank, fields in update["ranks"].items()}
            for slot in self._slots:
                self._write_slot(slot, before.get(slot.rank, {}))
            self._acknowledged = update["n"]
            self._read_slots()
            self._send_report()
        os.eventfd_write(self._wake_fd, 1)
        return True

    def close(self) -> None:
        """Tell the scheduler that no more reports will come, and close the files; may be repeated."""
        if self._wake_fd < 0:
            return
        self._end(b"")
        with contextlib.suppress(LedgerError):
            if self._threads[0].is_alive():
                self._transport.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_SECONDS)
        for slot in self._slots:
            slot.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    # -- parts -------------------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _read_slots(self) -> bool:
        """Read the fields to report; return whether they differ from the latest report.

        While a ledger is being made again they do not: an old report is never too high.
        """
        for slot in replace_moved_slots(self._runtime, self._instance, self._slots):
            self._write_slot(slot, {})
        if not all(slot.is_there() for slot in self._slots):
            return False
        names = (*REPORTED, *SlotGeometry._fields)
        fields = {slot.rank: {name: slot.words[slot.at[name]] for name in names} for slot in self._slots}
        if fields == self._reported:
            return False
        self._reported = fields
        return True

    def _send_report(self) -> None:
        report = {"n": self._acknowledged, "now_ms": self._now_ms(), "ranks": self._reported}
        self._transport.send(json.dumps(report).encode())

    def _write_slot(self, slot: Slot, before: Fields) -> None:
        """Write the fields of a rank's update that differ from `before`; ring its worker if it was rung."""
        if not slot.is_there():
            return  # all fields are written once the slot is found again
        fields = self._received.get(slot.rank, {})
        for name, value in fields.items():
            if name != "rings" and before.get(name) != value:
                is_time = name == "idle_since_ms" and value
                slot.set(name, max(1, value + self._clock_offset_ms) if is_time else value)
        if fields.get("rings", 0) != before.get("rings", 0):
            slot.ringer.ring()

    def _receive(self) -> None:
        while self.handle(self._transport.receive()):
            pass
        self._ended = True
        os.eventfd_write(self._wake_fd, 1)

    def _watch(self) -> None:
        """Report changes whenever an engine's doorbell rings, and at intervals while requests run.

        Some fields change without a ring, such as a reclaim.
        """
        poller = select.poll()
        for fd in (self._wake_fd, *(slot.bell_fd for slot in self._slots)):
            poller.register(fd, select.POLLIN)
        while not self._ended:
            for fd, _ in poller.poll(UPDATE_SECONDS * 1000 if self._is_busy() else None):
                drain_bell(fd)
            if not self._ended:
                self.report_changes()

    def _is_busy(self) -> bool:
        with self._mutex:
            return any(
                self._received.get(rank, {}).get("busy") or fields["demand_bytes"]
                for rank, fields in self._reported.items()
            )

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            if not self._ended:
                _log.warning("kvcached: the scheduler of these ranks cannot be reached any more: %s", error)
                self._end(json.dumps({"failed": str(error)}).encode())

    def _end(self, last_message: bytes) -> None:
        with self._mutex, contextlib.suppress(LedgerError):
            if not self._ended:
                self._ended = True
                self._transport.send(last_message)
        os.eventfd_write(self._wake_fd, 1)
