"""Divide the CPUs between a running and an idle engine: an idle engine that spins must not slow the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from devkit.process_groups import living

TOPOLOGY = Path("/sys/devices/system/cpu")


def halves(topology: Path = TOPOLOGY) -> tuple[frozenset[int], frozenset[int]] | None:
    """Return this process's CPUs in two halves; a core's threads stay together. None if it has one core."""
    cores: dict[str, set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        cores.setdefault(_core(topology, cpu), set()).add(cpu)
    if len(cores) < 2:
        return None
    parts = list(cores.values())
    middle = len(parts) // 2
    return frozenset().union(*parts[:middle]), frozenset().union(*parts[middle:])


def _core(topology: Path, cpu: int) -> str:
    """Return the list of the threads of a CPU's core, or the CPU itself if the system has no such list."""
    try:
        return (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def place(group: int, cpus: Iterable[int]) -> None:
    """Bind all threads of a process group, and the threads they start later, to these CPUs."""
    chosen = set(cpus)
    for pid in living(group):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in psutil.Process(pid).threads():
                _bind(thread.id, chosen)


def _bind(thread: int, cpus: set[int]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(thread, cpus)
