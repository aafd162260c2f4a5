"""The process group of an engine: its processes, the shared memory they map, and its end. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import psutil

from devkit.polling import holds_within

SHARED_MEMORY = Path("/dev/shm")
_TRACKER = "multiprocessing.resource_tracker"  # a process of Python's that outlives the processes it serves
_TRACKER_SECONDS = 3.0


class Entry(NamedTuple):
    """A line of the process table. A zombie has ended, but its parent has not collected it yet."""

    pid: int
    parent: int
    group: int
    zombie: bool


def table() -> dict[int, Entry]:
    """Return the process table by process id."""
    found = {}
    for process in psutil.process_iter(["ppid", "status"]):
        with contextlib.suppress(ProcessLookupError):
            group, zombie = os.getpgid(process.pid), process.info["status"] == psutil.STATUS_ZOMBIE
            found[process.pid] = Entry(process.pid, process.info["ppid"], group, zombie)
    return found


def living(group: int) -> list[int]:
    """Return the ids of the group's processes that have not ended."""
    return [entry.pid for entry in table().values() if entry.group == group and not entry.zombie]


def title_of(pid: int) -> str:
    """Return a process's command line, which vLLM replaces by the process's role; empty if it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def members(group: int) -> dict[int, str]:
    """Return the command lines of the group's living processes by process id, without resource trackers."""
    titles = {pid: title_of(pid) for pid in living(group)}
    return {pid: title for pid, title in titles.items() if _TRACKER not in title}


def shared_memory_of(group: int) -> frozenset[Path]:
    """Return the files directly in /dev/shm that processes of the group map."""
    inodes = set(_mapped(living(group)))
    return frozenset(path for path, inode in _files() if inode in inodes)


def kill_group(group: int, shared: Collection[Path] = ()) -> None:
    """Kill a process group and remove its files in /dev/shm: `shared`, and the files that it maps now.

    The resource trackers of Python's multiprocessing are killed last: a tracker removes the files of the
    processes that it serves after they have ended, and then ends itself. A file that another process maps
    stays.
    """
    shared = {*shared, *shared_memory_of(group)}
    for pid in members(group):
        _kill(pid)
    holds_within(lambda: not living(group), _TRACKER_SECONDS)
    for pid in living(group):
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
    """Yield the inodes of shared memory that processes map.

    psutil's memory maps have paths only, and a semaphore is mapped under another path than its file's.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                # addresses permissions offset device inode path
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHARED_MEMORY}/"):
                    yield int(fields[4])
