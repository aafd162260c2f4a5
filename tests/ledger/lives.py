"""Owners in forked processes that are killed at a chosen or random point; run by a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Account, Runtime, SchedulerView, set_limit
from kvcached_core.ledger.file import storage
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, attach, engine_usage, leave

T = TypeVar("T")


def _grow(account: Account, granules: int) -> None:
    account.created(account.lease(granules * GRANULE, PLENTY) // GRANULE)


def _obey(account: Account, view: SchedulerView) -> None:
    """Give memory back, down to the target that others ask for."""
    held, target = account.ready_bytes // GRANULE, view.target_granules()
    if target and held > target:
        account.publish(0, 0, unmaps=1)
        account.give_back(granules_released=held - target)


def _in_the_file(account: Account, act: Callable[[], T]) -> T:
    """Call `act`, which needs the account's slot; retry if another process has just deleted the file."""
    for _ in range(100):
        account.acknowledge()
        with contextlib.suppress(LedgerError):
            return act()
    return act()


def live(runtime: Runtime, instance: str, lose_the_file: bool) -> None:
    """Start, share a full device with a rival and other engines, obey tools, and leave."""
    begun = time.monotonic()

    def clock() -> float:
        return begun  # the number of write points is the same on a slow machine

    account = attach(runtime, instance, name=instance, floor_bytes=GRANULE, clock=clock)
    account.ask_to_start(2 * GRANULE, GRANULE, PLENTY)
    account.set_private_peak(0)
    _grow(account, 6)
    account.publish(min(account.ready_bytes, 3 * GRANULE), 5, maps=3)
    view = _in_the_file(account, lambda: SchedulerView.find(runtime, instance, 1, clock=clock))
    view.publish(engine_usage(1, 1, 1, 1, 9, 2))
    view.count(1, 1, False, 5)
    account.lease(CAPACITY, PLENTY)  # more than the device has, so others are asked to give
    account.created(min(20, (account.leased_bytes - account.ready_bytes) // GRANULE))
    rival = attach(runtime, f"{instance}-rival", name="rival", floor_bytes=2 * GRANULE, clock=clock)
    rival.ask_to_start(4 * GRANULE, 2 * GRANULE, PLENTY)  # it must wait, so others are asked to give
    account.give_back(bytes_never_ready=account.leased_bytes - account.ready_bytes)
    _obey(account, view)
    rival.ask_to_start(4 * GRANULE, 2 * GRANULE, PLENTY)
    rival.lease(CAPACITY, PLENTY)
    _obey(account, view)
    rival.lease(CAPACITY, PLENTY)
    _in_the_file(account, lambda: set_limit(runtime, account.name, 2 * GRANULE))
    account.acknowledge()
    account.give_back(granules_released=account.ready_bytes // GRANULE)
    if lose_the_file:
        runtime.device("host").ledger.unlink(missing_ok=True)
        for owner in (account, rival):
            owner.acknowledge()
            owner.lease(GRANULE, PLENTY)
    view.close()
    leave(rival)
    leave(account)


def _life(n: int, microseconds: int, act: Callable[[], None]) -> int:
    """Fork a process for `act`; it is killed at its n-th write point or after `microseconds` (0: neither)."""
    pid = os.fork()
    if pid:
        return pid
    passed = 0

    def reached(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == n:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        storage.set_write_hook(reached)
        if microseconds:
            # By default this signal ends a process on the spot, as SIGKILL does.
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
        act()
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, f"lived {passed}\n".encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def serve(runtime: Runtime) -> None:
    """Run the lives of each input line at once, `n:microseconds:lose` each; print how each one ended."""
    for line in sys.stdin:
        pids = []
        for number, order in enumerate(line.split()):
            n, microseconds, lose = map(int, order.split(":"))
            pids.append(_life(n, microseconds, partial(live, runtime, f"mortal{number}", bool(lose))))
        for pid in pids:
            _, status = os.waitpid(pid, 0)
            ended = f"killed {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else ""
            if ended or os.WEXITSTATUS(status):
                os.write(1, f"{ended or 'failed'}\n".encode())
