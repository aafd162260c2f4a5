"""The demo's child processes: they run side by side, and none is left when the demo ends."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from devkit.process_groups import kill_group, shared_memory_of
from devkit.processes import undisturbed


class Command(NamedTuple):
    """A command line, its environment, and the file for its output."""

    words: Sequence[str | Path]
    environ: Mapping[str, str]
    log: Path


@contextlib.contextmanager
def children(
    commands: Sequence[Command], grace_seconds: float = 10.0
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run commands, each in its own process group, for as long as the block lasts.

    At the end every command gets SIGINT, and all have `grace_seconds` together to clean up. Then their
    process groups are killed, and files they left in /dev/shm are removed.
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
                process.send_signal(signal.SIGINT)  # an engine passes the interrupt on to its children
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
