"""Pytest options, the order of the tests, and a runtime directory for this test session alone."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--driver NAME`, which selects the driver for tests/core/test_driver_contract.py."""
    parser.addoption("--driver", default="host", help="the driver that test_driver_contract.py tests")


def pytest_configure() -> None:
    """Restore Ctrl-C: a shell makes background jobs and their children ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that need an engine last, so that the cheap tests fail first."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_directory() -> Iterator[None]:
    """Give the session an empty runtime directory, so that no test touches the user's ledgers."""
    before = os.environ.get("KVCACHED_RUNTIME_DIR")
    folder = tempfile.mkdtemp(prefix="kvcached-tests-")
    os.environ["KVCACHED_RUNTIME_DIR"] = folder
    yield
    if before is None:
        del os.environ["KVCACHED_RUNTIME_DIR"]
    else:
        os.environ["KVCACHED_RUNTIME_DIR"] = before
    shutil.rmtree(folder, ignore_errors=True)
