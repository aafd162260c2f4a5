"""Discarding the slots of dead engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import Runtime, snapshot
from kvcached_core.ledger.tools.discard import discard
from tests.ledger.helpers import attach, die, files, hold, picture


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime.open(tmp_path / "run")


def test_slots_of_the_dead_go_with_their_files_and_nothing_else(runtime: Runtime) -> None:
    dead, other, live = attach(runtime, "a"), attach(runtime, "b", name="b"), attach(runtime, "c", name="c")
    hold(dead, 4)
    hold(live, 4)
    die(dead)
    die(other)
    (found,) = discard(runtime, "m")
    assert (found.slot, found.live, found.uuid) == (dead.slot, False, "host")
    assert [(owner.name, owner.live) for owner in picture(runtime).owners] == [("b", False), ("c", True)]
    assert "slot-00.owner" not in files(runtime) and {"slot-01.owner", "slot-02.owner"} <= files(runtime)
    assert discard(runtime, "m") == []


def test_a_living_owner_keeps_its_slot(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 4)
    (found,) = discard(runtime, "m")
    assert found.live and picture(runtime).leased_bytes == account.leased_bytes
    account.check()


def test_only_the_devices_named(runtime: Runtime) -> None:
    for device in ("host", "GPU-1"):
        die(attach(runtime, "a", device=DeviceIdentity(device, "test")))
    assert [found.uuid for found in discard(runtime, "m", devices=["GPU-1"])] == ["GPU-1"]
    assert [len(device.owners) for device in snapshot(runtime)] == [0, 1]
