"""The scheduler's end of a line to a node whose ledger it cannot map.

Each side tells the other the words that it writes: all of them, the latest only. What is heard late is what a
rank had. `created` is then too low, or was lowered because the scheduler ordered it (`created_most`) and has
counted on no more since. So held = min over ranks(created) - released stays true (I5).

The other end is `far_end`. A message down is {n, now_ms, ranks: {rank: {engine's words, rings}}}. Each is
answered by one up, {n of the latest heard, now_ms, ranks: {rank: {HEARD, geometry}}}; others come when those
words change. {failed: why} and an empty message are the last ones.
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

# The words that a scheduler reads, in this order: created and released rise together when an engine sleeps;
# the one that is written first is read first, so that held is rather too low.
HEARD = (
    "created_granules", "released_granules", "demand_bytes", "coming_bytes", "target_bytes", "must_bytes",
    "asked_until_ms", "limit_applied", "limit_wanted",
)  # fmt: skip
LOOK_SECONDS = 0.02  # what nobody is rung for is told so often at most
FIRST_SECONDS = 60.0  # a rank begins to tell before the scheduler is made
WARN_SECONDS, SILENCE_SECONDS = 10, 60  # to be told; to be taken for dead
STOP_SECONDS = 5.0


class Transport(Protocol):
    """Carries messages both ways, once and in order. For one sender and one receiver; raises LedgerError."""

    def send(self, message: bytes) -> None:
        """Send without waiting for the other side."""

    def receive(self, seconds: float | None = None) -> bytes:
        """Return the next message, waiting so long for it or for ever; an empty one is the last."""

    def interrupt(self) -> None:
        """Make this side's receive() return an empty message."""


class Heard(NamedTuple):
    """One rank's words as they were on its node at `sent_ms` of that node's clock."""

    words: Mapping[str, int]
    sent_ms: int


class _Bell:
    """Rings a worker on another node: the far end compares the counts."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        self._tell = tell
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1
        self._tell(True)

    def close(self) -> None:
        """Nothing was opened."""


class RemoteSlot(Slot):
    """The slot of a rank on another node, as last heard of. All but put() is for the scheduler's thread."""

    ringer: _Bell

    def __init__(self, end: NodeLink, rank: int, words: Mapping[str, int]) -> None:
        geometry = SlotGeometry(*(words[name] for name in SlotGeometry._fields))
        super().__init__(memoryview(array("Q", bytes(WORD * SLOT_WORDS))), 0, rank, geometry)
        self._end = end
        self._inbox: deque[Heard] = deque(maxlen=1)  # the latest replaces those before, in one operation
        self._latest: Mapping[str, int] = {}
        self.ringer = _Bell(end.tell)
        self.bell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def put(self, heard: Heard) -> None:
        """Leave to the scheduler what was heard; it is rung if that is news."""
        self._inbox.append(heard)
        if heard.words != self._latest:
            self._latest = heard.words
            self.ring_scheduler()

    def ring_scheduler(self) -> None:
        os.eventfd_write(self.bell_fd, 1)

    def told(self) -> dict[str, int]:
        """Return what the far end is to know of this rank."""
        return {name: self.words[self.at[name]] for name in ENGINE_WORDS} | {"rings": self.ringer.rings}

    def set(self, name: str, value: int) -> None:
        at = self.at[name]
        if self.words[at] != value:
            self.words[at] = value
            self._end.tell(False)

    def is_there(self) -> bool:
        """Take over what was heard since. Raises LedgerError if no more will be."""
        if self._inbox:
            self._take(self._inbox.popleft())
        if self._end.lost:
            raise LedgerError(f"rank {self.rank} cannot be reached any more: {self._end.lost}")
        return True

    def _take(self, heard: Heard) -> None:
        for name in HEARD:
            self.words[self.at[name]] = heard.words[name]
        if until_ms := heard.words["asked_until_ms"]:
            self.words[self.asked_until_at] = self._end.now_ms() + max(0, until_ms - heard.sent_ms)

    def close(self, keep_bell: bool = False) -> None:
        if self.bell_fd >= 0 and not keep_bell:
            os.close(self.bell_fd)
            self.bell_fd = -1


class NodeLink:
    """Keeps the mirrors of one node's ranks as they are there, and tells the node what is set in them.

    `lost` says why, once nothing more can be heard. Close it before the mirrors.
    """

    def __init__(
        self,
        post: Transport,
        node: int,
        clock: Callable[[], float],
        first_seconds: float = FIRST_SECONDS,
        silence_seconds: int = SILENCE_SECONDS,
    ) -> None:
        """Wait for the node's first message; raises LedgerError naming the node if it does not come."""
        self._post, self._node, self._clock = post, node, clock
        self._silence_seconds = silence_seconds
        self.lost = ""
        self._closed = False
        self._sent = 0
        self._news, self._hurry, self._answered = threading.Event(), threading.Event(), threading.Event()
        self.mirrors: dict[int, RemoteSlot] = {}
        try:
            self.hear(post.receive(first_seconds))
        except LedgerError as error:
            raise LedgerError(f"node {node} does not tell of its memory: {error}") from error
        if self.lost:
            raise LedgerError(self.lost)
        self._threads = [
            threading.Thread(target=run, name="kvcached-line", daemon=True)
            for run in (self._receive, self._send)
        ]

    def start(self) -> None:
        """Begin to exchange words."""
        for thread in self._threads:
            thread.start()

    def tell(self, hurry: bool) -> None:
        """Have the node told what is set: in a moment, or now."""
        if not self._news.is_set():
            self._news.set()
        if hurry:
            self._hurry.set()

    def now_ms(self) -> int:
        return int(self._clock() * 1000)

    def hear(self, message: bytes) -> bool:
        """Take in a message; say whether more may come."""
        said: dict[str, Any] = json.loads(message or b'{"failed": "it has ended"}')
        if "failed" in said:
            self._lose(f"node {self._node}: {said['failed']}")
            return False
        for rank, words in said["ranks"].items():
            if int(rank) not in self.mirrors:
                self.mirrors[int(rank)] = RemoteSlot(self, int(rank), words)
            self.mirrors[int(rank)].put(Heard(words, said["now_ms"]))
        if said["n"] == self._sent:
            self._answered.set()
        return True

    def say(self) -> bytes:
        """Return the next message."""
        self._answered.clear()
        self._sent += 1
        told = {rank: mirror.told() for rank, mirror in self.mirrors.items()}
        return json.dumps({"n": self._sent, "now_ms": self.now_ms(), "ranks": told}).encode()

    def close(self) -> None:
        """End the exchange; may be repeated."""
        if self._closed:
            return
        self._closed = True
        self.tell(True)
        self._answered.set()
        if self._threads[0].is_alive():
            with contextlib.suppress(LedgerError):
                self._post.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_SECONDS)

    def _receive(self) -> None:
        try:
            while self.hear(self._post.receive()) and not self._closed:
                pass
        except Exception as error:
            self._lose(f"the line to node {self._node} is broken: {error}")

    def _send(self) -> None:
        try:
            while not (self._closed or self.lost):
                self._news.wait()
                self._hurry.wait(LOOK_SECONDS)
                self._news.clear()  # before the words are read: what is set after this is told next
                self._hurry.clear()
                if not self._closed:
                    self._post.send(self.say())
                    self._wait_for_answer()
        except Exception as error:
            self._lose(f"the line to node {self._node} is broken: {error}")

    def _wait_for_answer(self) -> None:
        """Wait as long as the node may be silent; a second in which this process was stopped counts once."""
        for second in range(self._silence_seconds):
            if self._answered.wait(1.0) or self._closed or self.lost:
                return
            if second == WARN_SECONDS:
                _log.warning(
                    "kvcached: node %d has not answered for %d s; this engine ends after %d s",
                    self._node, second, self._silence_seconds,
                )  # fmt: skip
        self._lose(f"node {self._node} has not answered for {self._silence_seconds} s")

    def _lose(self, why: str) -> None:
        """Note that nothing more will be heard; an idle scheduler looks, and ends the engine."""
        if self._closed or self.lost:
            return
        self.lost = why
        self._answered.set()
        self.tell(True)
        for mirror in self.mirrors.values():
            mirror.ring_scheduler()
