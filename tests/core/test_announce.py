"""The description of a rank's KV cache in the ledger and the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvcached_core.config import Config
from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.errors import ConfigError
from kvcached_core.geometry import make_geometry
from kvcached_core.ledger import Account, Runtime, snapshot
from kvcached_core.startup.announce import (
    describe_to_ledger,
    floor_bytes,
    log_start,
    require_limit_for_request,
)
from kvcached_core.units import GIB, KIB, MIB, Size

GEOMETRY = make_geometry(MIB, 64 * KIB, (0, 64 * MIB), 1024, 4 * KIB)


def test_a_limit_below_one_request_is_refused_with_both_numbers_and_the_remedy() -> None:
    require_limit_for_request(GIB, GIB, 512, "raise it")
    with pytest.raises(
        ConfigError, match=r"limit of 1 GiB is less than the 2 GiB that one request of 512 .*: raise it"
    ):
        require_limit_for_request(GIB, 2 * GIB, 512, "raise it")


@pytest.mark.parametrize(
    ("setting", "expected"), [(None, MIB), (Size(GIB), GIB), (Size(percent=50.0), 2 * GIB)]
)
def test_a_floor_that_is_set_replaces_the_need_of_a_request(setting: Size | None, expected: int) -> None:
    assert floor_bytes(Config(floor=setting), 4 * GIB, MIB) == expected


def test_blocks_take_whole_granules() -> None:
    per_granule, granule_bytes = GEOMETRY.blocks_per_granule, GEOMETRY.granule_bytes
    sizes = [GEOMETRY.bytes_of_blocks(blocks) for blocks in (0, 1, per_granule, per_granule + 1)]
    assert sizes == [0, granule_bytes, granule_bytes, 2 * granule_bytes]


def test_the_ledger_and_the_log_show_the_geometry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvcached_core.startup.announce")
    runtime = Runtime.open(str(tmp_path / "run"))
    account = Account.attach(
        runtime, DeviceIdentity("GPU-1", "a device"), GIB, 0, instance="one", rank=0, name="one"
    )
    describe_to_ledger(account, GEOMETRY)
    log_start("host", GEOMETRY, 16, account)
    (owner,) = snapshot(runtime)[0].owners
    assert (owner.page_bytes, owner.granule_bytes) == (MIB, 2 * MIB)
    assert (owner.granule_count, owner.blocks_per_granule) == (64, GEOMETRY.blocks_per_granule)
    assert caplog.messages[0].startswith(
        "kvcached backend: driver host, page 1 MiB, 2 segment(s), granule 2 MiB"
    )
    assert "virtual capacity 128 MiB, floor 0 B, limit 1 GiB, engine one in ledger" in caplog.messages[0]
    account.detach()
