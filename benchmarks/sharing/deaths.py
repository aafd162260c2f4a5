"""Kill one rank with SIGKILL, and measure when its engine has ended and the ledgers are clean."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from devkit.process_groups import members
from kvcached_core.ledger import Runtime, check, snapshot

LOOK_SECONDS = 0.01


class Victim(Protocol):
    """The parts of an engine that kill_rank uses."""

    name: str

    @property
    def alive(self) -> bool:
        """Whether the engine's first process is alive."""

    @property
    def group(self) -> int:
        """The process group of all its processes."""


def rank_in(titles: Mapping[int, str], rank: int) -> int:
    """Return the process id whose title names this rank. Raises LookupError unless there is exactly one."""
    found = [pid for pid, title in titles.items() if re.search(rf"_TP{rank}\b", title)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} processes are rank {rank}, of {sorted(titles.values())}")
    return found[0]


def first_seconds(conditions: Mapping[str, Callable[[], bool]], seconds: float,
                  clock: Callable[[], float] = time.monotonic,
                  sleep: Callable[[float], None] = time.sleep) -> dict[str, float]:  # fmt: skip
    """Return the seconds until each condition first held, without conditions that did not hold in time."""
    begun, found = clock(), dict[str, float]()
    while len(found) < len(conditions):
        found |= {
            name: clock() - begun for name, holds in conditions.items() if name not in found and holds()
        }
        if clock() - begun > seconds:
            break
        sleep(LOOK_SECONDS)
    return found


def is_clean(runtime: Runtime, name: str) -> bool:
    """Return whether no ledger has a living owner of this name, and every ledger's check passes."""
    devices = snapshot(runtime)
    living = {owner.name for device in devices for owner in device.owners if owner.live}
    return name not in living and not any(check(device) for device in devices)


def kill_rank(victim: Victim, rank: int, runtime: Runtime, seconds: float) -> dict[str, float]:
    """Kill a rank of an engine, and return the seconds from the kill until each of four conditions held.

    `slot_free`: the rank's slot was free. `ended`: the engine's first process had ended. `gone`: all its
    processes had ended. `clean`: its ledgers were clean. For an engine in no ledger, `slot_free` and `clean`
    hold at once. Raises LookupError.
    """
    killed = rank_in(members(victim.group), rank)

    def slot_is_free() -> bool:
        owners = [owner for device in snapshot(runtime) for owner in device.owners if owner.live]
        return killed not in {owner.worker_pid for owner in owners}

    os.kill(killed, signal.SIGKILL)
    return first_seconds(
        {"slot_free": slot_is_free, "ended": lambda: not victim.alive,
         "gone": lambda: not members(victim.group), "clean": lambda: is_clean(runtime, victim.name)},
        seconds,
    )  # fmt: skip
