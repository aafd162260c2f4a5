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

from devkit.process_groups import kill_group, shared_memory_of, table

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_signals() -> None:
    """Make every signal that ends a program by hand act as Ctrl-C does, so that what was begun is undone."""
    # also where a shell started this in the background, which ignores SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # also inside asyncio, which turns SIGINT into an orderly end of its tasks
    for number in set(INTERRUPTS) - {signal.SIGINT}:
        signal.signal(number, lambda number, frame: signal.raise_signal(signal.SIGINT))


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
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """Return the children of this process, ended but not collected ones included."""
    return [entry.pid for entry in table().values() if entry.parent == os.getpid()]


def _kill(pids: Sequence[int]) -> None:
    """Kill children and collect them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


class Command(NamedTuple):
    """What to run, and where its output goes."""

    words: Sequence[str | Path]
    environ: Mapping[str, str]
    log: Path


@contextlib.contextmanager
def children(
    commands: Sequence[Command], grace_seconds: float = 10.0
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run commands, each in a process group of its own; at the end they are gone.

    They are interrupted as by Ctrl-C and have `grace_seconds` together to clean up, then their whole groups
    are killed, and what engines that kill their own processes leave in shared memory is removed.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            processes.append(_start(command))
        yield processes
    finally:
        with undisturbed():
            running = [process for process in processes if process.poll() is None]
            shared = {process.pid: shared_memory_of(process.pid) for process in running}
            for process in running:
                process.send_signal(signal.SIGINT)  # it tells its own children
            deadline = time.monotonic() + grace_seconds
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            for process in processes:
                kill_group(process.pid, shared.get(process.pid, ()))
                process.wait()


def _start(command: Command) -> subprocess.Popen[bytes]:
    with command.log.open("wb") as output:
        return subprocess.Popen(
            command.words,
            env=command.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def tail(log: Path, lines: int = 20) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
