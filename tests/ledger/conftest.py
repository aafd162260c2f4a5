"""A runtime directory for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached_core.ledger import Runtime


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime.open(tmp_path / "runtime")
