"""The process group of an engine: who is in it, what memory it shares, and its end. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")
_TRACKER = "multiprocessing.resource_tracker"  # of Python: it ends after all that it served
_TRACKER_SECONDS, _POLL_SECONDS = 3.0, 0.02


class Entry(NamedTuple):
    """A line of the process table; a zombie has ended and was not waited for."""

    pid: int
    parent: int
    group: int
    zombie: bool


def table() -> dict[int, Entry]:
    """Return the process table by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state parent group ...: the name may hold anything
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            pid = int(path.parent.name)
            found[pid] = Entry(pid, int(parent), int(group), state == "Z")
    return found


def living(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    return [entry.pid for entry in table().values() if entry.group == group and not entry.zombie]


def title_of(pid: int) -> str:
    """Return a process's command line, where vLLM puts its role; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def members(group: int) -> dict[int, str]:
    """Return the command lines of a group's living processes by process id, those of trackers left out."""
    titles = {pid: title_of(pid) for pid in living(group)}
    return {pid: title for pid, title in titles.items() if _TRACKER not in title}


def shared_memory_of(group: int) -> frozenset[Path]:
    """Return the files in /dev/shm, without those in its folders, that processes of a group map."""
    inodes = set(_mapped(living(group)))
    return frozenset(path for path, inode in _files() if inode in inodes)


def kill_group(group: int, shared: Collection[Path] = ()) -> None:
    """Kill a process group and remove what it leaves in /dev/shm: `shared`, and what it maps now.

    The trackers of Python's multiprocessing go last: one ends by itself when those it served have, and
    removes what they left. A file that another process maps stays.
    """
    shared = {*shared, *shared_memory_of(group)}
    for pid in members(group):
        _kill(pid)
    end = time.monotonic() + _TRACKER_SECONDS
    while (left := living(group)) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    for pid in left:
        _kill(pid)
    _remove(shared)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _remove(shared: Set[Path]) -> None:
    if left := [(path, inode) for path, inode in _files() if path in shared]:
        in_use = set(_mapped(table()))
        for path, inode in left:
            if inode not in in_use:
                path.unlink(missing_ok=True)


def _files() -> Iterator[tuple[Path, int]]:
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(OSError):
            yield path, path.lstat().st_ino


def _mapped(pids: Iterable[int]) -> Iterator[int]:
    """Yield the inodes of shared memory that processes map: a semaphore is mapped under another name."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                # addresses permissions offset device inode path
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
                    yield int(fields[4])
