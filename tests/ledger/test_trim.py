"""Trimming: a real account, view and governor give back memory that no request needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import NoSuchEngineError, Runtime, check
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.ledger.history import read
from kvcached_core.ledger.tools.trim import ask_to_trim, look_at_trims, wait_until_trimmed
from tests.cli.owner import PAGE, SIZE, Owner
from tests.ledger.helpers import GRANULE, attach, die, hold, picture


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime.open(tmp_path / "run")


def words(runtime: Runtime, slot: int, *names: str) -> list[int]:
    """Return these fields of a slot."""
    file = LedgerFile(runtime.device("host").ledger)
    found = [file.get(slot, name) for name in names]
    file.close()
    return found


def acting(*engines: Owner) -> Callable[[float], None]:
    """Return a sleep function during which the engines take a turn, as they do when rung."""

    def sleep(seconds: float) -> None:
        assert seconds > 0
        for engine in engines:
            engine.settle()

    return sleep


def test_spare_and_cached_memory_is_given_back_and_requests_keep_theirs(runtime: Runtime) -> None:
    engine = Owner(runtime, "a")
    engine.serve(used=8 * SIZE, cached=10 * SIZE)
    before = picture(runtime).owners[0]
    assert before.leased_bytes > 18 * PAGE and before.cached_bytes == 10 * PAGE
    trims = ask_to_trim(runtime, "a")
    (outcome,) = wait_until_trimmed(runtime, "a", trims, 10.0, sleep=acting(engine))
    assert outcome.holds and outcome.given_bytes >= 10 * PAGE
    in_use = {block.block_id // SIZE for block in engine.used} | {0}
    assert len(engine.used) == 8 * SIZE, "requests keep what they hold"
    assert {block.block_id // SIZE for block in engine.cached} <= in_use, "cache goes by the granule"
    after = picture(runtime).owners[0]
    # The engine has requests, so it may have leased its spare granules again.
    assert after.used_bytes >= before.used_bytes and after.leased_bytes <= before.leased_bytes - 10 * PAGE
    assert engine.memory_bytes() == after.ready_bytes
    assert check(picture(runtime)) == []
    (event,) = [event for event in read(runtime.device("host")) if event.data.get("taker") == "kvctl trim"]
    assert event.kind == "reclaim" and event.data["name"] == "a" and event.data["must_bytes"] == 0


def test_an_idle_engine_is_rung_and_keeps_the_granule_of_block_0(runtime: Runtime) -> None:
    engine = Owner(runtime, "a")
    engine.serve(used=0, cached=9 * SIZE)
    trims = ask_to_trim(runtime, "a")
    (outcome,) = wait_until_trimmed(runtime, "a", trims, 10.0, sleep=acting(engine))
    assert outcome.holds and outcome.leased_bytes == PAGE
    (again,) = look_at_trims(runtime, ask_to_trim(runtime, "a"))
    assert again.holds and again.given_bytes == 0, "there is nothing to ask for"


def test_a_trim_that_another_lease_lifts_is_repeated(runtime: Runtime) -> None:
    engine, other = Owner(runtime, "a"), attach(runtime, "b", name="b")
    engine.serve(used=0, cached=9 * SIZE)
    rounds = 0

    def lift_it_twice(seconds: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds <= 2:
            hold(other, 1)  # the arbiter overwrites the target: it asks for nothing
            assert words(runtime, engine.account.slot, "target_bytes") == [0]
        else:
            engine.settle()

    seconds = iter(range(1000))
    trims = ask_to_trim(runtime, "a")
    (outcome,) = wait_until_trimmed(
        runtime, "a", trims, 500.0, clock=lambda: float(next(seconds)), sleep=lift_it_twice
    )
    assert outcome.holds and rounds >= 3


def test_a_trim_never_raises_a_target_nor_asks_for_preemption(runtime: Runtime) -> None:
    engine = Owner(runtime, "a")
    engine.serve(used=4 * SIZE, cached=9 * SIZE)
    file = LedgerFile(runtime.device("host").ledger)
    slot = engine.account.slot
    for name, value in (("target_bytes", 2 * PAGE), ("must_bytes", 3 * PAGE), ("asked_until_ms", 1 << 60)):
        file.set(slot, name, value)
    ask_to_trim(runtime, "a")
    assert words(runtime, slot, "target_bytes", "must_bytes") == [2 * PAGE, 3 * PAGE]
    file.set(slot, "asked_until_ms", 1)  # lapsed: the target no longer holds
    ask_to_trim(runtime, "a")
    needed = file.get(slot, "needed_bytes")
    assert words(runtime, slot, "target_bytes", "must_bytes") == [needed, 0]
    file.close()


def test_an_engine_without_reported_needs_keeps_all_it_wants(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 9)
    file = LedgerFile(runtime.device("host").ledger)
    file.set(account.slot, "wanted_bytes", 5 * GRANULE + 1)
    (trim,) = ask_to_trim(runtime, "m")
    assert trim.target_bytes == 6 * GRANULE and trim.reclaimable
    file.set(account.slot, "spoken_claim", 0)
    (trim,) = ask_to_trim(runtime, "m")
    assert not trim.reclaimable and not look_at_trims(runtime, [trim])[0].holds
    file.close()


def test_the_dead_and_the_nameless_are_not_asked(runtime: Runtime) -> None:
    account = attach(runtime, "a")
    hold(account, 9)
    attach(runtime, "b", name="b", device=DeviceIdentity("GPU-1", "gpu"))
    trims = ask_to_trim(runtime, "m")
    die(account)
    (outcome,) = wait_until_trimmed(runtime, "m", trims, 10.0)
    assert outcome.gone and not outcome.holds
    with pytest.raises(NoSuchEngineError, match="there are b"):
        ask_to_trim(runtime, "m")
    with pytest.raises(NoSuchEngineError):
        ask_to_trim(runtime, "b", devices=["host"])
    assert len(ask_to_trim(runtime, "b", devices=["GPU-1"])) == 1
