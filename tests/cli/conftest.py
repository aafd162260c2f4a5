"""A runtime directory, and main() as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvcached_core.ledger import Runtime
from kvctl.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    monkeypatch.setenv("KVCACHED_RUNTIME_DIR", str(tmp_path / "runtime"))
    return Runtime.open()


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
