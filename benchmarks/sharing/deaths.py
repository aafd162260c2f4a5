"""kill -9 of one rank: when the rest of its engine has ended, and what the ledgers say meanwhile."""

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
    """An engine, as far as its death is looked at."""

    name: str

    @property
    def alive(self) -> bool:
        """Whether the process that was started lives."""

    @property
    def group(self) -> int:
        """The process group of all its processes."""


def rank_in(titles: Mapping[int, str], rank: int) -> int:
    """Return the process of a rank, which both engines name in its title. Raises LookupError."""
    found = [pid for pid, title in titles.items() if re.search(rf"_TP{rank}\b", title)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} processes are rank {rank}, of {sorted(titles.values())}")
    return found[0]


def first_seconds(conditions: Mapping[str, Callable[[], bool]], seconds: float,
                  clock: Callable[[], float] = time.monotonic,
                  sleep: Callable[[float], None] = time.sleep) -> dict[str, float]:  # fmt: skip
    """Return after how many seconds each condition first held; those are missing that never did in time."""
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
    """Say whether no ledger has a living owner of this name, and each adds up."""
    devices = snapshot(runtime)
    living = {owner.name for device in devices for owner in device.owners if owner.live}
    return name not in living and not any(check(device) for device in devices)


def kill_rank(victim: Victim, rank: int, runtime: Runtime, seconds: float) -> dict[str, float]:
    """Kill a rank of an engine; return when its slot was free, the engine's first process `ended`, all were
    `gone`, and its ledgers were `clean`; all true at once for an engine in no ledger. Raises LookupError."""
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
