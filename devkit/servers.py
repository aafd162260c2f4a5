"""Servers under test. Each has its own process group and log, and no process of it is left at the end."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY, kill_group, shared_memory_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    ".",
    "cli",
    "plugins/vllm_kvcached",
    "plugins/sglang_kvcached",
)  # this tree's packages come before installed ones
QUICK_START = ROOT / "devkit" / "quick_start"
LOGS = ROOT / "build" / "engine-logs"
CACHE = ROOT / "build" / "engine-cache"
BIN = Path(sys.executable).parent
MODEL_NAME = "m"
READY_SECONDS, STOP_SECONDS = 240.0, 20.0
FREE_PORTS = (20_000, 32_000)  # below the ports that Linux gives to clients
_FOREIGN = ("KVCACHED_", "VLLM_", "ENABLE_KVCACHED", "_KVCACHED_")


def environment(scratch: Path, runtime: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of an engine: ours without settings of engines and kvcached, then `extra`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return ours | {
        "KVCACHED_RUNTIME_DIR": str(runtime),
        "TMPDIR": str(scratch),
        "PYTHONPATH": os.pathsep.join([str(QUICK_START), *(str(ROOT / part) for part in PACKAGES)]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(CACHE),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),  # compiled once, for all engines
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
    } | dict(extra)  # fmt: skip


def cores(count: int) -> str:
    """Return the setting that binds each of `count` ranks to a core; if there are too few, ranks share."""
    there = sorted(os.sched_getaffinity(0))
    return "|".join(str(there[rank % len(there)]) for rank in range(count))


class Child:
    """A command in its own process group, with a temporary directory that is removed when it ends."""

    def __init__(self, name: str, runtime: Path, command: list[str], extra: Mapping[str, str]) -> None:
        self.name = name
        self.closed = False
        self._shared: frozenset[Path] = frozenset()
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self._scratch = tempfile.TemporaryDirectory(prefix="kvt-", dir=SHARED_MEMORY)
        environ = environment(Path(self._scratch.name), runtime, extra)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(errors="replace")

    def note_shared(self) -> None:
        """Remember the process group's files in shared memory: a killed process leaves them behind."""
        self._shared |= shared_memory_of(self.process.pid)

    def wait(self, seconds: float) -> int:
        """Return the exit status; fails if the process does not end in time."""

        def ended() -> bool:
            self.note_shared()  # SGLang (stock too) leaves files behind when its start is refused
            return not self.alive

        until(ended, seconds, f"{self.name} ends by itself")
        return int(self.process.returncode)

    def terminate(self, seconds: float) -> int:
        """Send SIGTERM, as a supervisor does, and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def close(self) -> None:
        """End the process and its group, whatever their state; may be called again."""
        self.closed = True
        self.note_shared()
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        kill_group(self.process.pid, self._shared)
        self.process.wait()
        self._scratch.cleanup()


class HttpServer(Child):
    """A child that serves HTTP on a local port; `path` answers with 200 once it is ready."""

    path = "/health"

    def __init__(
        self, name: str, runtime: Path, port: int, command: list[str], extra: Mapping[str, str]
    ) -> None:
        self.port = port
        self._answer = "none"  # the latest answer to a request for `path`
        super().__init__(name, runtime, command, extra)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        """Wait until the server answers; fails if it ends first or takes longer than READY_SECONDS."""
        try:
            until(self._answers, READY_SECONDS, f"{self.name} is ready")
        except TimeoutError as error:
            error.add_note(
                f"the last answer of port {self.port}: {self._answer}; sockets: {sockets(self.port)}"
            )
            raise
        self.note_shared()

    def _answers(self) -> bool:
        assert self.alive, f"{self.name} ended with status {self.process.returncode} before it was ready"
        # not httpx: its client takes 60 ms of processor time from the starting server
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        ) as connection:
            try:
                connection.request("GET", self.path)
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException) as error:
                self._answer = repr(error)
                return False
            self._answer = str(status)
            return status == http.HTTPStatus.OK


class Server(HttpServer):
    """`vllm serve` of one model."""

    def __init__(
        self, name: str, model: Path, runtime: Path, flags: list[str], extra: Mapping[str, str]
    ) -> None:
        port = free_port()
        fixed = ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
        command = [str(BIN / "vllm"), "serve", str(model), "--served-model-name", MODEL_NAME, *fixed, *flags]
        super().__init__(name, runtime, port, command, extra)


ChildT = TypeVar("ChildT", bound=Child)


class Fleet:
    """The children of a session; at most two are alive at a time."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def add(self, child: Child) -> None:
        """Take charge of a child until close_all()."""
        self._children.append(child)
        alive = [each.name for each in self._children if each.alive]
        assert len(alive) <= 2, f"too many engines at a time: {alive}"

    @contextlib.contextmanager
    def running(self, child: ChildT) -> Iterator[ChildT]:
        """Take charge of a child for as long as the block runs."""
        self.add(child)
        try:
            yield child
        finally:
            child.close()

    def forget_closed(self) -> None:
        """Drop closed children, so that their logs are no longer shown."""
        self._children = [child for child in self._children if not child.closed]

    def tails(self, lines: int = 40) -> Iterator[tuple[str, str]]:
        """Yield the name of every child and the last lines of its log."""
        for child in self._children:
            yield child.name, "\n".join(child.text().splitlines()[-lines:])

    def close_all(self) -> None:
        """Close all children, the latest first."""
        with contextlib.ExitStack() as steps:
            for child in self._children:
                steps.callback(child.close)


def sockets(port: int) -> list[str]:
    """Return the addresses, states and queues of all sockets of a local port, as the kernel writes them."""
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    return [" ".join(row[1:5]) for row in rows if row[1].endswith(f":{port:04X}")]


def free_port() -> int:
    """Return a port that is free on 127.0.0.1 and outside the range that the system gives to clients."""
    while True:
        port = random.randrange(*FREE_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
