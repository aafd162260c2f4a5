"""Leave no process behind: signals end a program in order, and its descendants are killed and collected."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator, Sequence

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_signals() -> None:
    """Make SIGTERM and SIGHUP act as Ctrl-C does, so that the program cleans up before it ends."""
    # A shell that starts a program in the background makes it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # asyncio turns SIGINT into an orderly end of its tasks, so the other signals are raised again as SIGINT.
    for number in set(INTERRUPTS) - {signal.SIGINT}:
        signal.signal(number, lambda number, frame: signal.raise_signal(signal.SIGINT))


@contextlib.contextmanager
def no_survivors() -> Iterator[None]:
    """Kill and collect every descendant at the end, including processes whose parent ended first."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # adopt orphans
    try:
        yield
    finally:
        with undisturbed():
            while children := [child.pid for child in psutil.Process().children()]:
                _kill(children)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore signals inside the block, which handles a first one and must end within a bounded time."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _kill(pids: Sequence[int]) -> None:
    """Kill children and collect them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
