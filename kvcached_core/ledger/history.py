"""The history of a device: its latest events, one line of JSON each, for tools.

Writing it takes no lock, never waits and raises no error; events may be lost. Two files take turns, so the
size is bounded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

from kvcached_core.events import KINDS, OBSERVERS, Event, Kind, Value, happened
from kvcached_core.ledger.file.runtime import DeviceFolder
from kvcached_core.ledger.file.storage import write_point

ROTATE_BYTES = 512 << 10
MOST_BYTES = ROTATE_BYTES + (64 << 10)  # of one file: further events are lost until it is put aside
_MOST_PENDING = 1024
_MOST_SECONDS = 1 << 36  # since the epoch, about the year 4100
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_BEGIN = b'{"kind":'
_encode = json.JSONEncoder(separators=(",", ":")).encode


class History:
    """Writes the history of one device. Any thread and any process may."""

    def __init__(self, folder: DeviceFolder) -> None:
        self._folder = folder
        self._path = str(folder.history)

    def append(self, event: Event) -> None:
        """Add an event with one write(2). If the folder is missing or the disk is full, the event is lost."""
        head = {"kind": event.kind, "at_seconds": event.at_seconds, "wall_seconds": event.wall_seconds}
        line = _encode(head | dict(event.data)).encode() + b"\n"
        with contextlib.suppress(OSError):
            fd = self._open()
            try:
                if os.lseek(fd, 0, os.SEEK_END) + len(line) <= MOST_BYTES:
                    write_point("history")
                    os.write(fd, line)
            finally:
                os.close(fd)

    def put_aside(self) -> None:
        """Rename the file if it is full. The lock is held, so no other process renames the next file."""
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_size >= ROTATE_BYTES:
                write_point("history.old")
                os.rename(self._path, self._folder.old_history)

    def _open(self) -> int:
        try:
            return os.open(self._path, _APPEND)
        except FileNotFoundError:
            fd = os.open(self._path, _APPEND | os.O_CREAT, self._folder.file_mode)
            with contextlib.suppress(OSError):  # another user of the group has just made it
                os.fchmod(fd, self._folder.file_mode)  # open applies the umask
            return fd


def read(folder: DeviceFolder, limit: int | None = None) -> list[Event]:
    """Return the latest `limit` events (1 or more), or all, newest last. Damaged lines are skipped."""
    # The newer file is read first: if it is put aside in between, its lines are read twice, not lost.
    newer = _lines(folder.history)
    lines = dict.fromkeys(_lines(folder.old_history) + newer)
    events = [event for line in lines if (event := _parse(line)) is not None]
    return sorted(events, key=lambda event: (event.wall_seconds, event.at_seconds))[
        -limit if limit else None :
    ]


def _lines(path: Path) -> list[bytes]:
    try:
        with os.fdopen(os.open(path, _READ), "rb") as file:
            return file.read(2 * MOST_BYTES).splitlines()
    except OSError:
        return []


def _parse(line: bytes) -> Event | None:
    """Return the event of a line; None if the line was cut or damaged, or is of a newer version."""
    try:
        data = json.loads(line[line.rfind(_BEGIN) :])  # a line that was cut may stand before it
        kind, at, wall = data.pop("kind"), float(data.pop("at_seconds")), float(data.pop("wall_seconds"))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    sound = isinstance(kind, str) and kind in KINDS and math.isfinite(at) and 0 <= wall < _MOST_SECONDS
    if not sound or not all(isinstance(value, Value) for value in data.values()):
        return None
    return Event(cast(Kind, kind), at, wall, data)


class Reporter:
    """Reports the events of one slot to the device's history and to observers."""

    def __init__(self, folder: DeviceFolder, name_of: Callable[[], str], slot_of: Callable[[], int]) -> None:
        self._history = History(folder)
        self._device = folder.path.name
        self._name_of, self._slot_of = name_of, slot_of
        self._pending: deque[Event] = deque(maxlen=_MOST_PENDING)
        OBSERVERS.present()  # loads plugins now, not in a step

    def report(self, kind: Kind, locked: bool = False, **data: Value) -> None:
        """Report an event; pass `name` and `slot` if it happened to another slot.

        With `locked` the caller holds the ledger's lock, which must not be held for long: the event waits for
        `flush`, or for the next event that is reported without the lock.
        """
        source: dict[str, Value] = {
            "device": self._device, "name": self._name_of(), "slot": self._slot_of()
        }  # fmt: skip
        self._pending.append(happened(kind, source | data))
        if locked:
            self._history.put_aside()
        else:
            self.flush()

    def flush(self) -> None:
        """Report the events that wait since they happened under the lock; not to be called under it."""
        with contextlib.suppress(IndexError):
            while True:
                event = self._pending.popleft()
                self._history.append(event)
                if OBSERVERS.present():
                    OBSERVERS.tell(event)
