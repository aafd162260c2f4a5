"""The ranks' end of a line: on their node it reads and writes slots as their scheduler would; see `line`."""

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
from kvcached_core.ledger.remote.link import HEARD, LOOK_SECONDS, STOP_SECONDS, Transport
from kvcached_core.ledger.slots import Slot, SlotGeometry, find_again, find_places

_log = logging.getLogger(__name__)

Words = dict[str, int]


class NodeAgent:
    """Tells the scheduler of the slots of this node's ranks, and writes into them what it says.

    Runs in one of the node's workers, on two threads: one receives, the other sleeps on the engine's bells.
    """

    def __init__(self, post: Transport, runtime: Runtime, instance: str, ranks: set[int],
                 clock: Callable[[], float]) -> None:  # fmt: skip
        """Find the slots and tell of them. Raises LedgerError with what is missing."""
        self._post, self._runtime, self._instance, self._clock = post, runtime, instance, clock
        self._slots: list[Slot] = list(find_places(runtime, instance, ranks).values())
        self._heard: dict[int, Words] = {}
        self._said: dict[int, Words] = {}
        self._answers = 0  # the number of the latest message heard
        self._ahead_ms = 0  # this node's clock before the scheduler's
        self._ended = False
        self._mutex = threading.Lock()  # over slots, and so that what is read first is sent first
        self._moved = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name="kvcached-line", daemon=True)
            for run in (self._receive, self._watch)
        ]
        self.look()

    def start(self) -> None:
        """Begin to exchange words."""
        for thread in self._threads:
            thread.start()

    def look(self) -> None:
        """Tell the scheduler of what has changed. Raises LedgerError if a slot or the line is gone."""
        with self._mutex:
            if self._read():
                self._say()

    def hear(self, message: bytes) -> bool:
        """Do what a message says, and answer it; say whether more may come. Raises LedgerError."""
        if not message:
            return False
        said: dict[str, Any] = json.loads(message)
        with self._mutex:
            self._ahead_ms = self._now_ms() - said["now_ms"]
            before, self._heard = self._heard, {int(rank): words for rank, words in said["ranks"].items()}
            for slot in self._slots:
                self._write(slot, before.get(slot.rank, {}))
            self._answers = said["n"]
            self._read()
            self._say()
        os.eventfd_write(self._moved, 1)
        return True

    def close(self) -> None:
        """Tell the scheduler that nothing more will be heard, and let the files go; may be repeated."""
        if self._moved < 0:
            return
        self._end(b"")
        with contextlib.suppress(LedgerError):
            if self._threads[0].is_alive():
                self._post.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_SECONDS)
        for slot in self._slots:
            slot.close()
        os.close(self._moved)
        self._moved = -1

    # -- parts -------------------------------------------------------------------------------------------

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _read(self) -> bool:
        """Read the words to tell; say whether they are others than were told last.

        Where a ledger is being made again they are what they were: too old is never too much.
        """
        for slot in find_again(self._runtime, self._instance, self._slots):
            self._write(slot, {})
        if not all(slot.is_there() for slot in self._slots):
            return False
        names = (*HEARD, *SlotGeometry._fields)
        words = {slot.rank: {name: slot.words[slot.at[name]] for name in names} for slot in self._slots}
        if words == self._said:
            return False
        self._said = words
        return True

    def _say(self) -> None:
        message = {"n": self._answers, "now_ms": self._now_ms(), "ranks": self._said}
        self._post.send(json.dumps(message).encode())

    def _write(self, slot: Slot, before: Words) -> None:
        """Write what was heard of a rank and differs from `before`; ring its worker if that was rung."""
        if not slot.is_there():
            return  # all is written where it is found again
        words = self._heard.get(slot.rank, {})
        for name, value in words.items():
            if name != "rings" and before.get(name) != value:
                is_time = name == "idle_since_ms" and value
                slot.set(name, max(1, value + self._ahead_ms) if is_time else value)
        if words.get("rings", 0) != before.get("rings", 0):
            slot.ringer.ring()

    def _receive(self) -> None:
        while self.hear(self._post.receive()):
            pass
        self._ended = True
        os.eventfd_write(self._moved, 1)

    def _watch(self) -> None:
        """Look whenever an engine's bell rings; while requests run also for what rings nobody."""
        poller = select.poll()
        for fd in (self._moved, *(slot.bell_fd for slot in self._slots)):
            poller.register(fd, select.POLLIN)
        while not self._ended:
            for fd, _ in poller.poll(LOOK_SECONDS * 1000 if self._is_busy() else None):
                drain_bell(fd)
            if not self._ended:
                self.look()

    def _is_busy(self) -> bool:
        with self._mutex:
            return any(
                self._heard.get(rank, {}).get("busy") or words["demand_bytes"]
                for rank, words in self._said.items()
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
                self._post.send(last_message)
        os.eventfd_write(self._moved, 1)
