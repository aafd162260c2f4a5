"""Another owner of memory on the device of the engine under test: an account in the same ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import Account, Runtime
from tests.engine.conftest import CAPACITY_BYTES, HEADROOM_BYTES, MIB


@contextmanager
def neighbour(runtime: Path, name: str, floor_bytes: int = 0) -> Iterator[Account]:
    """Attach another account during the block; afterwards give its memory back."""
    account = Account.attach(
        Runtime.open(runtime), DeviceIdentity("host", "host"), CAPACITY_BYTES, HEADROOM_BYTES,
        instance=name, rank=0, name=name, floor_bytes=floor_bytes,
    )  # fmt: skip
    account.describe(page_bytes=MIB, granule_bytes=MIB, granule_count=CAPACITY_BYTES // MIB,
                     blocks_per_granule=1, block_count=CAPACITY_BYTES // MIB, stride_bytes=MIB)  # fmt: skip
    try:
        yield account
    finally:
        account.give_back(granules_released=account.ready_bytes // MIB)
        account.detach()
