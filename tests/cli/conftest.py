"""Fixtures: a runtime directory, and main() as a function that returns its output."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_core.ledger import Account, Runtime
from kvctl.main import main
from tests.ledger.helpers import ATTACHED, die

Run = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def worker(account: Account) -> Iterator[None]:
    """Acknowledge changes when the doorbell rings, as a worker's thread does."""
    end, stop = os.pipe()
    poller = select.poll()
    poller.register(account.fileno(), select.POLLIN)
    poller.register(end, select.POLLIN)

    def work() -> None:
        while end not in [fd for fd, _ in poller.poll()]:
            account.drain()
            account.acknowledge()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        os.close(stop)
        thread.join()
        os.close(end)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """Yield a runtime directory that commands use by default; files left open in it are closed at the end."""
    monkeypatch.setenv("KVCACHED_RUNTIME_DIR", str(tmp_path / "runtime"))
    yield Runtime.open()
    while ATTACHED:
        die(ATTACHED.pop())
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if tmp_path in path.parents and path.name.startswith("slot-"):  # a mapped ledger closes its own
                os.close(descriptor)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return main() as a function that gives exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return call
