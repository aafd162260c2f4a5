"""Order of the suite, and a runtime directory of its own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--driver NAME`: the driver that tests/core/test_driver_contract.py tests."""
    parser.addoption("--driver", default="host", help="the driver that test_driver_contract.py tests")


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start: whoever is started in the background ignores it, children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that need an engine last: what is cheap fails first."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_directory() -> Iterator[None]:
    """Keep the whole session away from the ledgers of the user who runs it."""
    before = os.environ.get("KVCACHED_RUNTIME_DIR")
    folder = tempfile.mkdtemp(prefix="kvcached-tests-")
    os.environ["KVCACHED_RUNTIME_DIR"] = folder
    yield
    if before is None:
        del os.environ["KVCACHED_RUNTIME_DIR"]
    else:
        os.environ["KVCACHED_RUNTIME_DIR"] = before
    shutil.rmtree(folder, ignore_errors=True)
