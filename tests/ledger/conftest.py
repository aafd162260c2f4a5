"""A runtime directory for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.ledger import Runtime
from tests.ledger.helpers import ATTACHED, die


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    yield Runtime.open(tmp_path / "runtime")
    while ATTACHED:
        die(ATTACHED.pop())  # may be repeated
