"""The history of a device: its latest events, a line of JSON each, for tools. It may be lost, and is never
in anybody's way: no lock, no waiting, no error. Two files of half the bound each take turns.
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
MOST_BYTES = ROTATE_BYTES + (64 << 10)  # of one file; more only if nobody wrote under the lock for long: lost
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
        """Add an event with one write(2). Without a folder, or on a full disk, it is lost."""
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
        """Rename the file if it is full; the lock is held, or another process might rename the next one."""
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_size >= ROTATE_BYTES:
                write_point("history.old")
                os.rename(self._path, self._folder.old_history)

    def _open(self) -> int:
        try:
            return os.open(self._path, _APPEND)
        except FileNotFoundError:
            fd = os.open(self._path, _APPEND | os.O_CREAT, self._folder.file_mode)
            with contextlib.suppress(OSError):  # another user of the group made it just now
                os.fchmod(fd, self._folder.file_mode)  # whatever the umask was
            return fd


def read(folder: DeviceFolder, limit: int | None = None) -> list[Event]:
    """Return the events, newest last: the latest `limit` (1 or more) or all. What is none is passed over."""
    # The newer file is read first: if it is put aside in between, its lines are seen twice rather than never.
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
    """Return the event of a line; None for one that was cut, damaged, or written by a newer version."""
    try:
        data = json.loads(line[line.rfind(_BEGIN) :])  # behind a line that was cut
        kind, at, wall = data.pop("kind"), float(data.pop("at_seconds")), float(data.pop("wall_seconds"))
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    sound = isinstance(kind, str) and kind in KINDS and math.isfinite(at) and 0 <= wall < _MOST_SECONDS
    if not sound or not all(isinstance(value, Value) for value in data.values()):
        return None
    return Event(cast(Kind, kind), at, wall, data)


class Reporter:
    """Tells of what happens to one slot of a device: to the device's history, and to observers."""

    def __init__(self, folder: DeviceFolder, name_of: Callable[[], str], slot_of: Callable[[], int]) -> None:
        self._history = History(folder)
        self._device = folder.path.name
        self._name_of, self._slot_of = name_of, slot_of
        self._pending: deque[Event] = deque(maxlen=_MOST_PENDING)
        OBSERVERS.present()  # loads plugins now rather than in a step

    def report(self, kind: Kind, locked: bool = False, **data: Value) -> None:
        """Tell of an event; `name` and `slot` may be given, where it happened to another's slot.

        With `locked` the caller holds the ledger's lock, in which nobody may linger: it is told by `flush`,
        or before the next event that is reported without it.
        """
        who: dict[str, Value] = {
            "device": self._device, "name": self._name_of(), "slot": self._slot_of()
        }  # fmt: skip
        self._pending.append(happened(kind, who | data))
        if locked:
            self._history.put_aside()
        else:
            self.flush()

    def flush(self) -> None:
        """Tell of what was reported under the lock; not to be called under it."""
        with contextlib.suppress(IndexError):
            while True:
                event = self._pending.popleft()
                self._history.append(event)
                if OBSERVERS.present():
                    OBSERVERS.tell(event)
