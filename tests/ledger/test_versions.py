"""Versions of the layout that share one file: the previous one, this one, and later ones."""

from __future__ import annotations

import struct

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Runtime, SchedulerView, check
from kvcached_core.ledger.file import layout, storage
from tests.ledger.helpers import (
    CAPACITY,
    GRANULE,
    PLENTY,
    attach,
    die,
    engine_usage,
    files,
    hold,
    leave,
    picture,
)
from tests.ledger.old_owner import OldOwner, make_old_file
from tests.ledger.test_arbiter import Clock, Engine


@pytest.fixture
def clock() -> Clock:
    return Clock()


def minor_of(runtime: Runtime) -> int:
    data = runtime.device("host").ledger.read_bytes()
    return int(struct.unpack_from("<Q", data, layout.HEADER_AT["minor"] * layout.WORD)[0])


@pytest.mark.parametrize("file_of", ["the version before", "this version"])
def test_owners_of_this_version_and_the_one_before_share_a_device(
    runtime: Runtime, clock: Clock, file_of: str
) -> None:
    if file_of == "the version before":
        make_old_file(runtime)
        old = OldOwner(runtime, "old")
        new = Engine(runtime, "new", clock)
    else:
        new = Engine(runtime, "new", clock)
        old = OldOwner(runtime, "old")
    assert minor_of(runtime) == (layout.MINOR if file_of == "this version" else 0)
    assert old.lease(40) == 40
    old.put("wanted_bytes", 40 * GRANULE)
    old.put("busy", 1)
    new.holds(0, missing=30)
    assert new.ask(30) == 24 and new.view.refused(), "who cannot read what it is asked is not asked"
    assert check(picture(runtime)) == []
    assert old.lease(10) == 0
    old.give_back(6)
    assert new.ask(6) == 6, "of 64 it is entitled to the 30 it needs"
    assert check(picture(runtime)) == []
    shown = {owner.instance: owner for owner in picture(runtime).owners}
    assert shown["old"].live and shown["old"].leased_bytes == 34 * GRANULE
    new.view.close()
    leave(new.account)
    assert old.lease(64) == 30
    old.leave()
    assert picture(runtime).owners == () and files(runtime) == {"ledger", "lock"}


@pytest.mark.parametrize(("used", "wanted", "gets"), [(60, 64, 32), (4, 4, 54), (20, 20, 44)])
def test_an_owner_of_the_version_before_counts_by_what_it_uses_and_wants(
    runtime: Runtime, clock: Clock, used: int, wanted: int, gets: int
) -> None:
    new = Engine(runtime, "new", clock).holds(1, missing=53)
    old = OldOwner(runtime, "old")
    assert old.lease(1) == 1
    old.put("used_bytes", used * GRANULE)
    old.put("wanted_bytes", wanted * GRANULE)
    old.put("demand_bytes", (wanted - 1) * GRANULE)
    old.put("busy", 1)
    assert new.ask(53) + 1 == gets
    assert new.view.refused() == (gets < 54)
    assert [owner.target_bytes for owner in picture(runtime).owners] == [0, 0], "it could not read it"
    old.close()


def test_words_of_this_version_do_not_leak_into_a_later_claim_of_the_one_before(
    runtime: Runtime, clock: Clock
) -> None:
    first = attach(runtime, "first", name="first", clock=clock)
    starter = attach(runtime, "starter", name="starter", clock=clock)
    hold(first, 50)
    assert not starter.ask_to_start(30 * GRANULE, 0, PLENTY).admitted
    view = SchedulerView.find(runtime, "starter", 1, clock=clock)
    view.publish(engine_usage(needed_granules=60, wanted_granules=60))
    die(starter)
    leave(attach(runtime, "sweeper", name="sweeper"))
    old = OldOwner(runtime, "old")
    assert old.slot == 1
    assert old.lease(4) == 4
    (_, shown) = picture(runtime).owners
    assert (shown.starting_bytes, shown.needed_bytes, shown.queued_at_ms, shown.reclaims) == (0, 0, 0, 0)
    assert first.lease(CAPACITY, PLENTY) == 10 * GRANULE, "nothing is kept for a start that is none"
    view.close()
    old.close()
    newcomer = Engine(runtime, "newcomer", clock)
    assert newcomer.account.slot == 1
    assert newcomer.asked == (0, 0)
    assert first.lease(CAPACITY, PLENTY) == 4 * GRANULE
    assert check(picture(runtime)) == []


def test_another_major_version_is_refused_while_its_owners_live(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    with runtime.device("host").ledger.open("r+b") as file:
        file.seek(layout.HEADER_AT["major"] * layout.WORD)
        file.write(struct.pack("<Q", layout.MAJOR + 1))
    with pytest.raises(LedgerError, match="layout 2, this version 1"):
        attach(runtime, "b")
    die(account)
    attach(runtime, "b")
    assert check(picture(runtime)) == []


def test_a_newer_minor_version_with_more_fields_works_together(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runtime.device("host")
    folder.make()
    with monkeypatch.context() as newer:
        newer.setattr(layout, "MINOR", layout.MINOR + 1)
        newer.setattr(layout, "HEADER_BYTES", 1024)
        newer.setattr(layout, "SLOT_BYTES", 2048)
        newer.setattr(layout, "SLOT_COUNT", 80)
        storage.make_ledger(folder.ledger, 0o600, "host", CAPACITY, 0, unwritten=set())
        inode = folder.ledger.stat().st_ino
    accounts = [attach(runtime, f"i{n}", name=f"n{n}") for n in range(70)]
    hold(accounts[69], 5)
    assert folder.ledger.stat().st_ino == inode
    assert folder.ledger.stat().st_size == 1024 + 80 * 2048
    assert [owner.ready_bytes for owner in picture(runtime).owners] == [0] * 69 + [5 * GRANULE]
    assert SchedulerView.find(runtime, "i69", 1).created() == 5
    assert check(picture(runtime)) == []
