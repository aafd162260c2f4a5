"""Helpers of the ledger's tests: small devices, accounts on them, child processes that own accounts."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Account, DeviceSnapshot, EngineUsage, Runtime, snapshot

GRANULE = 1 << 20
CAPACITY = 64 * GRANULE
HOST = DeviceIdentity("host", "host")
PLENTY = MemoryInfo(CAPACITY, CAPACITY)
_BOUND_SECONDS = 30.0
_ROOT = Path(__file__).resolve().parents[2]
ATTACHED: list[Account] = []  # attached by the running test; their descriptors are closed when it ends


def engine_usage(
    used_blocks: int = 0,
    cached_blocks: int = 0,
    stranded_blocks: int = 0,
    needed_granules: int = 0,
    wanted_granules: int = 0,
    released_granules: int = 0,
    spare_granules: int = 0,
) -> EngineUsage:
    """Return the usage that a scheduler publishes; `spare_granules` of the wanted ones can wait."""
    return EngineUsage(
        used_blocks=used_blocks,
        cached_blocks=cached_blocks,
        stranded_blocks=stranded_blocks,
        mapped_granules=0,
        wanted_granules=wanted_granules,
        needed_granules=needed_granules,
        released_granules=released_granules,
        enough_granules=wanted_granules - spare_granules,
    )


def describe(account: Account) -> None:
    """Give an account granules of one page and four blocks."""
    account.describe(
        page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=CAPACITY // GRANULE, blocks_per_granule=4,
        block_count=4 * CAPACITY // GRANULE, stride_bytes=GRANULE // 4,
    )  # fmt: skip


def attach(
    runtime: Runtime,
    instance: str,
    rank: int = 0,
    name: str = "m",
    device: DeviceIdentity = HOST,
    capacity_bytes: int = CAPACITY,
    headroom_bytes: int = 0,
    limit_bytes: int | None = None,
    floor_bytes: int = 0,
    weight: int = 100,
    clock: Callable[[], float] = time.monotonic,
) -> Account:
    """Return an attached account with its geometry described."""
    account = Account.attach(
        runtime, device, capacity_bytes, headroom_bytes, instance=instance, rank=rank, name=name,
        engine="test 1", model="tiny", limit_bytes=limit_bytes, floor_bytes=floor_bytes,
        weight=weight, clock=clock,
    )  # fmt: skip
    describe(account)
    ATTACHED.append(account)
    return account


def readable(*descriptors: int, seconds: float = 0.0) -> int:
    """Return how many of these descriptors can be read, waiting at most `seconds` for the first.

    select() cannot take descriptors above 1024, poll() can.
    """
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return len(poller.poll(seconds * 1000))


def hold(account: Account, granules: int) -> None:
    """Lease and create `granules`."""
    assert account.lease(granules * GRANULE, PLENTY) == granules * GRANULE
    account.created(granules)


def leave(account: Account) -> None:
    """Give back everything and detach."""
    account.publish(0, 0)
    account.give_back(account.leased_bytes - account.ready_bytes, account.ready_bytes // GRANULE)
    account.detach()


def picture(runtime: Runtime) -> DeviceSnapshot:
    """Return a snapshot of the only device."""
    (device,) = snapshot(runtime)
    return device


def files(runtime: Runtime, device: DeviceIdentity = HOST) -> set[str]:
    """Return the names of a device's files, except its history, which outlives the engines."""
    folder = runtime.device(device.uuid)
    return set(os.listdir(folder.path)) - {folder.history.name, folder.old_history.name}


class Child:
    """A child process that runs `body` after the imports below and prints lines."""

    def __init__(self, runtime: Runtime, body: str, instance: str = "child") -> None:
        head = f"""
            import os, pathlib, signal, sys
            from kvcached_core.ledger import Runtime
            from kvcached_core.ledger.file import storage
            from tests.ledger.helpers import GRANULE, PLENTY, attach, hold, leave
            def say(text): os.write(1, (text + "\\n").encode())
            instance = {instance!r}
            runtime = Runtime(pathlib.Path({str(runtime.path)!r}))
        """
        code = textwrap.dedent(head) + textwrap.dedent(body)
        environ = os.environ | {"PYTHONPATH": str(_ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
        )

    def has_output(self, seconds: float) -> bool:
        """Wait at most `seconds` until the child prints something or ends."""
        assert self.process.stdout is not None
        return readable(self.process.stdout.fileno(), seconds=seconds) > 0

    def read_line(self) -> str:
        """Return the next line, or the rest of the output if the child has ended."""
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            assert self.has_output(_BOUND_SECONDS), f"the child said nothing for {_BOUND_SECONDS} s"
            byte = os.read(self.process.stdout.fileno(), 1)
            if not byte:
                break
            line += byte
        return line.decode().strip()

    def resume(self) -> None:
        """Send the line that the child waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill the child with SIGKILL and wait until it has ended."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(_BOUND_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def child(runtime: Runtime, body: str, instance: str = "child") -> Iterator[Child]:
    """Run a child process while the block runs."""
    process = Child(runtime, body, instance)
    try:
        yield process
    finally:
        process.close()


def die(account: Account) -> None:
    """Close an account's descriptors, as the death of its process would; its slot stays as it is."""
    account._slot.close()
