"""Measure the ledger under many processes: waits for its lock, the cost of a lease, and the cost of a death.

    python -m benchmarks.micro.ledger_lock [--out FILE]

Processes share one ledger; none has an engine or a device. Times are in milliseconds.

    wait_steady   8 processes each lease and give back 50 times a second, at different moments
    wait_storm    8 processes lease and give back without a pause, 10,000 times each: the lock is never free
    after_death   time from kill -9 of the lock's holder until a waiting process has its lease
    lease_N, contested_N    one lease among N owners: with memory for all, and while all others wait
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from devkit.statistics import percentile
from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import BusyError
from kvcached_core.ledger import Account, Runtime, check, snapshot
from kvcached_core.ledger.file.lock import LedgerLock

GRANULE = 16 << 20
CAPACITY = 5120 * GRANULE
MEMORY = MemoryInfo(CAPACITY, CAPACITY)
PROCESSES = 8
STORM_LEASES = 10_000
STEADY_LEASES, STEADY_PER_SECOND = 400, 50
OWNERS = (1, 2, 8, 32, 64)
COST_REPEATS = 200
DEATHS = 50
KEPT = 4000  # samples of each distribution in the file, taken evenly from the sorted samples
GOAL_MS = 1.0  # p99 of the steady wait


class TimedLock(LedgerLock):
    """A lock that records how long each process waited for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waits_ms: list[float] = []

    def _take(self, bound_seconds: float) -> int:
        started = time.perf_counter()
        fd = super()._take(bound_seconds)
        self.waits_ms.append((time.perf_counter() - started) * 1e3)
        return fd


def attach(runtime: Runtime, name: str) -> Account:
    """Attach a new owner of this name to the ledger and return its account."""
    account = Account.attach(
        runtime, DeviceIdentity("host", "host"), CAPACITY, 0, instance=name, rank=0, name=name
    )
    account.describe(
        page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=CAPACITY // GRANULE, blocks_per_granule=8,
        block_count=8 * CAPACITY // GRANULE, stride_bytes=GRANULE // 8,
    )  # fmt: skip
    return account


def work(folder: str, number: int, leases: int, per_second: float, pipe: Connection) -> None:
    """After a message on `pipe`, lease and give back; then send the waits and the number of BusyErrors."""
    runtime, chance = Runtime.open(folder), random.Random(number)
    account = attach(runtime, f"p{number}")
    account._membership.lock = lock = TimedLock(runtime.device("host").lock)
    pipe.send("ready")
    pipe.recv()
    due, busy = time.perf_counter(), 0
    for _ in range(leases):
        if per_second:
            due += chance.expovariate(per_second)
            time.sleep(max(0.0, due - time.perf_counter()))
        try:
            granted = account.lease(chance.randint(1, 32) * GRANULE, MEMORY)
        except BusyError:
            busy += 1
            continue
        account.created(granted // GRANULE)
        account.give_back(granules_released=granted // GRANULE)
    account.detach()
    pipe.send((lock.waits_ms, busy))


def crowd(leases: int, per_second: float) -> tuple[list[float], dict[str, Any]]:
    """Run the processes and read the ledger meanwhile; return the sorted waits, and notes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        folder = os.path.join(base, "runtime")
        pipes, processes = [], []
        for number in range(PROCESSES):
            mine, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(folder, number, leases, per_second, theirs)))
            pipes.append(mine)
            processes[-1].start()
        for pipe in pipes:
            pipe.recv()
        started, readings, wrong = time.perf_counter(), 0, 0
        for pipe in pipes:
            pipe.send("begin")
        while not all(pipe.poll() for pipe in pipes):
            wrong += sum(bool(check(device)) for device in snapshot(Runtime.open(folder)))
            readings += 1
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    waits = sorted(wait for found, _ in answers for wait in found)
    told = {
        "leases": PROCESSES * leases, "seconds": seconds, "takes": len(waits), "readings": readings,
        "violations": wrong, "busy": sum(busy for _, busy in answers), **summary(waits),
    }  # fmt: skip
    return waits, told


def after_death() -> list[float]:
    """Return the times from the death of the lock's holder until a waiting process has its lease."""
    found = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        runtime = Runtime.open(Path(base) / "runtime")
        account = attach(runtime, "waiter")
        path = runtime.device("host").lock
        for _ in range(DEATHS):
            holder, killed_at = _hold(path), 0.0
            pauses = 0

            def pause(seconds: float) -> None:
                nonlocal pauses, killed_at
                pauses += 1
                if pauses == 20:
                    killed_at = time.perf_counter()
                    os.kill(holder, signal.SIGKILL)  # noqa: B023
                time.sleep(seconds)

            account._membership.lock = LedgerLock(path, sleep=pause)
            granted = account.lease(GRANULE, MEMORY)
            found.append((time.perf_counter() - killed_at) * 1e3)
            account.give_back(bytes_never_ready=granted)
            os.waitpid(holder, 0)
        account.detach()
    return found


def _hold(path: Path) -> int:
    """Fork a process that holds the lock until it is killed; return its process id."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with LedgerLock(path).held():
            os.write(write, b"1")
            while True:
                signal.pause()
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return pid


def costs(owners: int) -> dict[str, list[float]]:
    """Return the times of a lease among `owners` owners: with memory for all, and while all others wait."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        runtime = Runtime.open(Path(base) / "runtime")
        accounts = [attach(runtime, f"o{number}") for number in range(owners)]
        first, *others = accounts

        def alone() -> None:
            first.give_back(bytes_never_ready=first.lease(GRANULE, MEMORY))

        found = {f"lease_{owners}": [_timed(alone) for _ in range(COST_REPEATS)]}
        if others:
            others[0].lease(CAPACITY, MEMORY)
            for other in others[1:]:
                other.lease(GRANULE, MEMORY)
            found[f"contested_{owners}"] = [
                _timed(lambda: first.lease(GRANULE, MEMORY)) for _ in range(COST_REPEATS)
            ]
        for account in accounts:
            account.give_back(bytes_never_ready=account.leased_bytes)
            account.detach()
    return found


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1e3


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": percentile(values, 50), "p99_ms": percentile(values, 99), "max_ms": max(values)}


def thinned(ordered: Sequence[float]) -> list[float]:
    """Return at most KEPT of the sorted values, evenly spread and with the greatest."""
    step = max(1, -(-len(ordered) // KEPT))
    return [round(value, 4) for value in ordered[::-1][::step]]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and write the result; returns the exit status."""
    parser = options_of.parser("micro.ledger_lock", __doc__, "ledger_lock.json")
    options = parser.parse_args(arguments)
    started = time.time()
    steady, steady_told = crowd(STEADY_LEASES, STEADY_PER_SECOND)
    storm, storm_told = crowd(STORM_LEASES, 0)
    deaths = after_death()
    samples = {"wait_steady_ms": thinned(steady), "wait_storm_ms": thinned(storm), "after_death_ms": deaths}
    lease_ms = {name: values for owners in OWNERS for name, values in costs(owners).items()}
    samples |= {f"{name}_ms": values for name, values in lease_ms.items()}
    notes = {
        "processes": PROCESSES, "goal_p99_ms": GOAL_MS, "goal_met": steady_told["p99_ms"] <= GOAL_MS,
        "wait_steady": steady_told, "wait_storm": storm_told, "after_death": summary(deaths),
        **{name: summary(values) for name, values in lease_ms.items()},
        "samples": f"at most {KEPT} of the waits, evenly from the sorted ones; the notes are of all waits",
    }  # fmt: skip
    command = ["python", "-m", "benchmarks.micro.ledger_lock", *arguments]
    record.write(options.out, command, samples, {}, started, notes)
    for name, note in notes.items():
        print(name, note)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
