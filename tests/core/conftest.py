"""Fixtures for the tests of the pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_account import FakeAccount
from tests.small_pool import COUNT, PAGE


@pytest.fixture
def account() -> Iterator[FakeAccount]:
    """Return an account with room for all granules."""
    account = FakeAccount(2 * PAGE, COUNT * 2 * PAGE)
    yield account
    account.close()
