"""Files that were deleted, cut, overwritten, of another version, or in a place that is not safe."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Runtime, SchedulerView, check
from kvcached_core.ledger.file import layout
from kvcached_core.ledger.file.runtime import DeviceFolder
from tests.ledger.helpers import CAPACITY, GRANULE, PLENTY, attach, die, engine_usage, hold, leave, picture

Damage = Callable[[Path], None]


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def write_word(name: str, value: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(layout.HEADER_AT[name] * layout.WORD)
            file.write(struct.pack("<Q", value))

    write.__name__ = f"{name}_{value}"
    return write


DAMAGES: list[Damage] = [
    cut, empty, zero, write_word("magic", 7), write_word("slot_count", 1 << 40), write_word("slot_bytes", 9),
    write_word("header_bytes", 0), write_word("capacity_bytes", 1 << 63),
]  # fmt: skip
each_damage = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@each_damage
def test_a_damaged_file_without_living_users_is_made_anew(runtime: Runtime, damage: Damage) -> None:
    die(attach(runtime, "a"))
    damage(runtime.device("host").ledger)
    assert picture(runtime).damage and check(picture(runtime))
    hold(attach(runtime, "b"), 3)
    assert check(picture(runtime)) == []
    assert [owner.instance for owner in picture(runtime).owners] == ["b"]


@each_damage
def test_a_newcomer_refuses_a_damaged_file_that_is_in_use(runtime: Runtime, damage: Damage) -> None:
    account = attach(runtime, "a")
    hold(account, 3)
    damage(runtime.device("host").ledger)
    with pytest.raises(LedgerError, match=r"1 engine workers that use it are alive \(slots 0\): end them"):
        attach(runtime, "b")
    with pytest.raises(LedgerError):
        SchedulerView.find(runtime, "a", 1)


@pytest.mark.parametrize("damage", [cut, empty, zero, DAMAGES[3]], ids=lambda damage: damage.__name__)
def test_the_users_of_a_damaged_file_write_it_again(runtime: Runtime, damage: Damage) -> None:
    a, b = attach(runtime, "a"), attach(runtime, "b")
    hold(a, 3)
    hold(b, 60)
    damage(runtime.device("host").ledger)
    assert a.lease(GRANULE, PLENTY) == 0, "b holds memory that the new file does not show yet"
    assert [owner.written for owner in picture(runtime).owners] == [True, False]
    b.acknowledge()
    assert [owner.written for owner in picture(runtime).owners] == [True, True]
    assert a.lease(CAPACITY, PLENTY) == GRANULE
    for account in (a, b):
        account.check()
    assert check(picture(runtime)) == []


def test_an_owner_that_dies_before_it_writes_its_slot_holds_nobody_up(runtime: Runtime) -> None:
    a, b = attach(runtime, "a"), attach(runtime, "b")
    hold(b, 60)
    runtime.device("host").ledger.unlink()
    assert a.lease(GRANULE, PLENTY) == 0
    die(b)
    assert a.lease(CAPACITY, PLENTY) == CAPACITY


def test_a_newcomer_after_a_deletion_waits_until_all_slots_are_written(runtime: Runtime) -> None:
    a = attach(runtime, "a")
    hold(a, 60)
    a.drain()
    runtime.device("host").ledger.unlink()
    b = attach(runtime, "b", name="other")
    assert b.slot == 1
    assert b.lease(CAPACITY, PLENTY) == 0
    a.acknowledge()
    assert b.lease(CAPACITY, PLENTY) == 4 * GRANULE


def test_a_scheduler_follows_its_worker_to_the_new_file(runtime: Runtime) -> None:
    accounts = [attach(runtime, "a", rank) for rank in range(2)]
    view = SchedulerView.find(runtime, "a", 2)
    bells = list(view.filenos())
    for account in accounts:
        hold(account, 5)
    view.publish(engine_usage(used_blocks=3, wanted_granules=7))
    runtime.device("host").ledger.unlink()
    assert view.created() == 5
    accounts[1].acknowledge()
    assert view.created() == 5
    accounts[0].acknowledge()
    accounts[0].lease(GRANULE, PLENTY)
    accounts[0].created(1)
    assert view.created() == 5 and list(view.filenos()) == bells
    assert [account.wanted_bytes for account in accounts] == [7 * GRANULE] * 2
    assert [owner.used_bytes for owner in picture(runtime).owners] == [3 * GRANULE // 4] * 2
    view.publish(engine_usage(wanted_granules=8))
    assert [account.wanted_bytes for account in accounts] == [8 * GRANULE] * 2


def test_a_scheduler_outlives_a_file_that_was_cut(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    view = SchedulerView.find(runtime, "a", 1)
    hold(account, 5)
    assert (view.created(), view.granule_limit()) == (5, 64)
    cut(runtime.device("host").ledger)
    assert (view.created(), view.granule_limit(), view.refused()) == (5, 64, False)
    view.publish(engine_usage(wanted_granules=9))
    account.publish(GRANULE, 0)
    assert account.wanted_bytes == 0
    account.acknowledge()
    assert view.created() == 5
    assert account.wanted_bytes == 9 * GRANULE


@pytest.mark.parametrize("name", ["slot-00.owner", "slot-00.worker", "slot-00.engine"])
def test_i4_an_owner_whose_file_was_deleted_claims_a_slot_again(runtime: Runtime, name: str) -> None:
    account = attach(runtime, "a")
    hold(account, 5)
    bell = account.fileno()
    view = SchedulerView.find(runtime, "a", 1)
    (runtime.device("host").path / name).unlink()
    account.acknowledge()
    (owner,) = [owner for owner in picture(runtime).owners if owner.live]
    assert owner.ready_bytes == 5 * GRANULE and account.fileno() == bell
    assert view.created() == 5
    view.publish(engine_usage(wanted_granules=6))
    assert os.read(bell, 10)
    leave(account)
    assert picture(runtime).owners == ()


def replace(path: Path) -> None:
    """Put another file of the same contents in a file's place."""
    other = path.with_name("other")
    shutil.copy(path, other)
    os.rename(other, path)


def replace_folder(folder: DeviceFolder) -> None:
    """Put a copy in its place, with the same times and without the files of slots."""
    copy = folder.path.with_name("copy")
    shutil.copytree(folder.path, copy, ignore=shutil.ignore_patterns("slot*"))
    shutil.copystat(folder.path, copy)
    shutil.rmtree(folder.path)
    os.rename(copy, folder.path)


CHANGES: dict[str, Callable[[DeviceFolder], None]] = {
    "the ledger is deleted": lambda folder: folder.ledger.unlink(),
    "the ledger is replaced": lambda folder: replace(folder.ledger),
    "the ledger is cut": lambda folder: cut(folder.ledger),
    "the owner's file is deleted": lambda folder: folder.owner(0).unlink(),
    "the owner's file is replaced": lambda folder: replace(folder.owner(0)),
    "a bell is renamed": lambda folder: os.rename(folder.engine_bell(0), folder.path / "other"),
    "the folder is deleted": lambda folder: shutil.rmtree(folder.path),
    "the folder is replaced": replace_folder,
}


@pytest.mark.parametrize("change", CHANGES)
def test_i4_a_change_in_a_folder_that_was_quiet_is_noticed(
    runtime: Runtime, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unchanged folder costs one stat(); each stat() releases Python's lock."""
    account, folder = attach(runtime, "a"), runtime.device("host")
    hold(account, 5)
    os.utime(folder.path, (0, 0))
    account.acknowledge()
    looks, stat = [], os.stat

    def counted(*arguments: Any, **options: Any) -> os.stat_result:
        looks.append(arguments)
        return stat(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", counted)
        account.acknowledge()
    assert len(looks) == 1
    CHANGES[change](folder)
    account.acknowledge()
    (owner,) = [owner for owner in picture(runtime).owners if owner.live]
    assert owner.ready_bytes == 5 * GRANULE
    account.check()
    view = SchedulerView.find(runtime, "a", 1)
    account.drain()
    view.publish(engine_usage(wanted_granules=6))
    assert os.read(account.fileno(), 10)
    view.close()


def test_a_folder_that_has_just_changed_is_checked_in_full(runtime: Runtime) -> None:
    """A change within the same tick of the file system's clock would go unnoticed."""
    folder = runtime.device("host")
    account = attach(runtime, "a")
    assert folder.state() is None
    os.utime(folder.path, (0, 0))
    assert folder.state() == folder.state() is not None
    leave(account)
