"""Child processes that are surely gone when the demo is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
TRACKER_SECONDS, _POLL_SECONDS = 3.0, 0.02


@contextlib.contextmanager
def no_survivors() -> Iterator[None]:
    """Kill and collect every descendant at the end, also those that lost their parent on the way."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become ours
    try:
        yield
    finally:
        with undisturbed():
            while children := _children():
                _kill(children)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let no second Ctrl-C interrupt what the first one began; what is done here has a bound."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Entry(NamedTuple):
    """A line of the process table; a zombie is one that ended and was not waited for."""

    pid: int
    parent: int
    group: int
    zombie: bool


def _table() -> Iterator[Entry]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state parent group ...: the name may hold anything
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            yield Entry(int(path.parent.name), int(parent), int(group), state == "Z")


def _children() -> list[int]:
    """Return the children of this process, ended but not collected ones included."""
    return [entry.pid for entry in _table() if entry.parent == os.getpid()]


def _kill(pids: Sequence[int]) -> None:
    """Kill children and collect them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _kill_group(group: int) -> None:
    """Kill a process group, the trackers of Python's multiprocessing last.

    A tracker ends by itself when those it served have, and removes what they left in shared memory.
    """
    for entry in _table():
        if entry.group == group and not _is_tracker(entry.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry.pid, signal.SIGKILL)
    deadline = time.monotonic() + TRACKER_SECONDS
    while any(e.group == group and not e.zombie for e in _table()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def child(
    command: Sequence[str | Path], environ: Mapping[str, str], log: Path, grace_seconds: float = 10.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, its output in `log`; at the end it is gone.

    It is interrupted as by Ctrl-C and has `grace_seconds` to clean up, then its whole group is killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with undisturbed():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # it tells its own children
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_seconds)
            _kill_group(process.pid)
            process.wait()


def tail(log: Path, lines: int = 20) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
