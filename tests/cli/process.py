"""Run kvctl and engines without a model as processes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from devkit import polling
from kvcached_core.ledger import Runtime

ROOT = Path(__file__).resolve().parents[2]
BOUND_SECONDS = 15.0


def environment(runtime: Runtime, **more: str) -> dict[str, str]:
    """Return the environment in which a child finds the sources and the ledgers."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "cli"))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return kept | {"PYTHONPATH": path, "KVCACHED_RUNTIME_DIR": str(runtime.path), **more}


def kvctl(
    *arguments: str, runtime: Runtime, stdin: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run kvctl until it exits."""
    return subprocess.run(
        [sys.executable, "-m", "kvctl", *arguments], env=environment(runtime, **more), input=stdin,
        capture_output=True, text=True, timeout=BOUND_SECONDS, check=False,
    )  # fmt: skip


def start(*arguments: str, runtime: Runtime, **more: str) -> subprocess.Popen[bytes]:
    """Start kvctl."""
    return subprocess.Popen(
        [sys.executable, "-m", "kvctl", *arguments], env=environment(runtime, **more),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def line_of(stream: IO[bytes] | None) -> str:
    """Wait for the next line of a child and return it."""
    assert stream is not None
    line = b""
    poller = select.poll()  # select() takes no descriptor above 1023, and accounts of other tests hold many
    poller.register(stream, select.POLLIN)
    while not line.endswith(b"\n"):
        assert poller.poll(BOUND_SECONDS * 1000), f"nothing in {BOUND_SECONDS} s"
        byte = os.read(stream.fileno(), 1)
        if not byte:
            break
        line += byte
    return line.decode().rstrip("\n")


def until(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    """Poll until a condition holds. Raises TimeoutError with `what` after BOUND_SECONDS."""
    polling.until(condition, BOUND_SECONDS, what, poll_seconds=0.01)


class OwnerProcess:
    """A live engine that carries out lines sent to it (see owner.py)."""

    def __init__(self, runtime: Runtime, name: str, device: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.owner", name, device], env=environment(runtime),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def say(self, line: str) -> str:
        """Send a line and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        return line_of(self.process.stdout)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill the engine with SIGKILL if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(BOUND_SECONDS)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def owner(runtime: Runtime, name: str, device: str = "host") -> Iterator[OwnerProcess]:
    """Run an engine during the block, which begins when the engine is ready."""
    process = OwnerProcess(runtime, name, device)
    try:
        assert line_of(process.process.stdout) == "ready"
        yield process
    finally:
        process.end()
