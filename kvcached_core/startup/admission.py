"""Starting beside other engines: claim memory, wait until it is free, report how much loading has taken."""

from __future__ import annotations

import logging
import math
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import BusyError, CapacityError
from kvcached_core.ledger.start_queue import Turn
from kvcached_core.units import format_size

_log = logging.getLogger(__name__)

RETRY_SECONDS = 0.2  # or when the doorbell rings; a claim lapses 1 s after its latest request
LOG_SECONDS = 5.0
REPORT_SECONDS = 0.25
STOP_SECONDS = 10.0


class StartingAccount(Protocol):
    """The part of an account that wait_for_admission() uses."""

    def ask_to_start(self, private_bytes: int, floor_bytes: int, memory: MemoryInfo) -> Turn: ...
    def acknowledge(self) -> None: ...
    def drain(self) -> None: ...
    def fileno(self) -> int: ...


class ReportingAccount(Protocol):
    """The part of an account that LoadingReporter uses."""

    def acknowledge(self) -> None: ...
    def publish(self, mapped_bytes: int, private_now_bytes: int) -> None: ...


class FloorAccount(Protocol):
    """The part of an account that set_floor() uses."""

    def set_floor_bytes(self, floor_bytes: int) -> None: ...


def wait_for_doorbell(fd: int, seconds: float) -> None:
    """Sleep until the ledger rings this engine's doorbell, at most `seconds`."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll(math.ceil(seconds * 1000))


def wait_for_admission(
    account: StartingAccount,
    memory: Callable[[], MemoryInfo],
    private_bytes: int,
    floor_bytes: int,
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[int, float], None] = wait_for_doorbell,
    purpose: str = "start",
) -> None:
    """Wait until the ledger has promised this engine `private_bytes` outside its KV cache, and its floor.

    Asks at least once. Raises CapacityError, with the numbers, if both can never fit or do not fit in time.
    """
    begun = tell_at = clock()
    turn = Turn(False)
    while True:
        account.drain()  # before the request: memory given back after this line rings the doorbell again
        account.acknowledge()
        busy = False
        try:
            turn = account.ask_to_start(private_bytes, floor_bytes, memory())
        except BusyError:
            busy = True
        now = clock()
        if turn.admitted:
            if now - begun >= RETRY_SECONDS:
                _log.info("kvcached: admitted after %.1f s", now - begun)
            return
        state = _state(turn, private_bytes, floor_bytes, busy)
        left_seconds = begun + timeout_seconds - now
        if left_seconds <= 0:
            raise _no_room(purpose, timeout_seconds, state)
        if now >= tell_at:
            _log.info("kvcached: waiting to %s, %.0f s at most: %s", purpose, left_seconds, state)
            tell_at = now + LOG_SECONDS
        wait(account.fileno(), min(RETRY_SECONDS, left_seconds))


def _no_room(purpose: str, timeout_seconds: float, state: str) -> CapacityError:
    return CapacityError(
        f"no room to {purpose} within {timeout_seconds:g} s: {state}. Wait longer (kvcached.start_seconds), "
        "end another engine, lower its limit or floor (kvctl limit, kvctl floor), or set the memory that "
        "this engine takes (kvcached.start_size) if it is less"
    )


def set_floor(
    account: FloorAccount,
    floor_bytes: int,
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Set the exact floor. Raises CapacityError if it does not fit (I3), BusyError if the time runs out."""
    give_up_at = clock() + timeout_seconds
    while True:
        try:
            return account.set_floor_bytes(floor_bytes)
        except BusyError:
            if clock() >= give_up_at:
                raise
        sleep(RETRY_SECONDS)


def _state(turn: Turn, private_bytes: int, floor_bytes: int, busy: bool) -> str:
    """Say in numbers how much memory the engine waits for."""
    needed = (
        f"this engine takes {format_size(private_bytes)} outside its KV cache and has a floor of "
        f"{format_size(floor_bytes)}"
    )
    if busy:
        return f"{needed}, and the ledger is busy"
    ahead = f"{turn.ahead} started before it and still wait" if turn.ahead else "no engine is ahead of it"
    return (
        f"{needed}; {format_size(turn.free_bytes)} are free, {format_size(turn.missing_bytes)} are missing, "
        f"{ahead}"
    )


class LoadingReporter:
    """A thread that reports, while an engine loads, how much of its claim it has taken.

    Like the supply thread later, this thread acknowledges controls that tools set, and attaches again if the
    ledger was lost. Otherwise the ledger would grant no engine on this device memory until loading ends.
    """

    def __init__(
        self, account: ReportingAccount, mapped_bytes: Callable[[], int], private_bytes: Callable[[], int]
    ) -> None:
        self._account = account
        self._mapped_bytes = mapped_bytes
        self._private_bytes = private_bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvcached-loading", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current report. May be repeated, and called without start()."""
        self._ended.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(STOP_SECONDS)

    def report(self) -> None:
        """Report once."""
        self._account.acknowledge()
        self._account.publish(self._mapped_bytes(), self._private_bytes())

    def _run(self) -> None:
        try:
            while not self._ended.wait(REPORT_SECONDS):
                self.report()
        except Exception:
            # The claim stays: the ledger counts too much, never too little.
            _log.exception("kvcached: the memory this engine takes while it loads is no longer reported")
