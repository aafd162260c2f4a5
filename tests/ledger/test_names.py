"""Names, texts, files and fields."""

from __future__ import annotations

import itertools
import logging
import os
import stat
from pathlib import Path

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Runtime, snapshot
from kvcached_core.ledger.file import layout
from tests.ledger.helpers import (
    CAPACITY,
    GRANULE,
    attach,
    files,
    hold,
    leave,
    picture,
)

TOTAL = CAPACITY // GRANULE


def test_names_are_unique_among_living_instances_over_all_devices(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = DeviceIdentity("GPU-1", "gpu")
    first = attach(runtime, "a")
    with caplog.at_level(logging.WARNING):
        second = attach(runtime, "b", rank=0, device=gpu)
    assert "this one is m-2" in caplog.text
    names = [first.name, second.name, attach(runtime, "b", rank=1).name, attach(runtime, "c").name]
    assert names == ["m", "m-2", "m-2", "m-3"]
    leave(first)
    assert attach(runtime, "d").name == "m"


def test_long_texts_are_cut_between_characters(runtime: Runtime) -> None:
    first = attach(runtime, "a", name="ä" * 50)
    second = attach(runtime, "b", name="ä" * 50)
    assert first.name == "ä" * 32 and second.name == "ä" * 31 + "-2"
    assert [owner.name for owner in picture(runtime).owners] == [first.name, second.name]


@pytest.mark.parametrize("instance", ["", "x" * 65, "a\0b"])
def test_an_instance_id_that_cannot_be_a_key_is_refused(runtime: Runtime, instance: str) -> None:
    with pytest.raises(LedgerError, match="1 to 64 bytes"):
        attach(runtime, instance)


@pytest.mark.parametrize("shared", [False, True])
def test_files_are_for_the_user_or_the_group_only(tmp_path: Path, shared: bool) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2770 if shared else 0o700)
    runtime = Runtime.open(folder)
    before = os.umask(0o077)
    try:
        attach(runtime, "a")
    finally:
        os.umask(before)
    assert runtime.shared is shared
    path = runtime.device("host").path
    modes = {name: stat.S_IMODE((path / name).stat().st_mode) for name in files(runtime)}
    assert set(modes.values()) == {0o660 if shared else 0o600}
    assert stat.S_IMODE(path.stat().st_mode) == (0o2770 if shared else 0o700)


def test_devices_have_ledgers_of_their_own(runtime: Runtime) -> None:
    devices = [DeviceIdentity(uuid, "gpu") for uuid in ("GPU-a/../b", "GPU-c")]
    for device, rank in zip(devices, itertools.count(), strict=False):
        hold(attach(runtime, "a", rank=rank, device=device), TOTAL)
    assert [device.uuid for device in snapshot(runtime)] == ["GPU-a/../b", "GPU-c"]
    assert all(path.parent == runtime.path for path in (folder.path for folder in runtime.devices()))


def test_the_table_of_the_layout_has_every_field_once() -> None:
    rows = [row.split("|")[1].strip() for row in layout.table().splitlines()[2:]]
    names = [field.name for field in layout.SLOT]
    found: list[str] = []
    for first, _, last in (row.partition(" to ") for row in rows):
        found += names[names.index(first) : names.index(last or first) + 1]
    assert found == names and sum(" to " in row for row in rows) == 2
    assert layout.table() in (Path(__file__).parents[2] / "docs/design.md").read_text(), (
        "docs/design.md is stale"
    )
    assert layout.SLOT_WORDS * layout.WORD <= layout.SLOT_BYTES
    assert layout.HEADER_WORDS * layout.WORD <= layout.HEADER_BYTES
