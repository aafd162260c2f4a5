"""Waking from sleep: weights and floor are claimed before they are taken, as at the start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_core.errors import CapacityError
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.startup.rank_start import RankStartup
from kvcached_core.units import GIB
from tests.core.test_rank_start import CAPACITY, DEVICE, GRANULE, Device

PRIVATE = 20 * GIB  # weights, activations and context; asleep, only the context is left
CONTEXT = GIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device that nobody uses."""
    made = Device(tmp_path / "run")
    yield made
    for start in made.starts:
        start.close()


class Engine:
    """An engine that serves, with a floor of 2 GiB."""

    def __init__(self, device: Device, **chosen: object) -> None:
        self.private_bytes = PRIVATE
        self.device = device
        self.start: RankStartup = device.start(**chosen)
        self.start.enter(DEVICE, CAPACITY, PrivateMemory(lambda: self.private_bytes, lambda: 0, lambda: 0),
                         lambda: 0)  # fmt: skip
        self.start.wait_for_room(device.memory, 0, 0, on_host=False)
        device.free_bytes -= PRIVATE
        self.start.end(0)
        self.show()

    def show(self) -> None:
        self.start.account.publish(0, self.start.private.now())

    def fall_asleep(self) -> None:
        self.private_bytes = CONTEXT
        self.device.free_bytes += PRIVATE - CONTEXT
        self.start.note_asleep()
        self.show()

    def wake(self) -> None:
        self.start.wait_to_wake(self.device.memory)
        self.private_bytes = PRIVATE
        self.device.free_bytes -= PRIVATE - CONTEXT
        self.start.note_awake()
        self.show()


def test_what_a_sleeper_freed_is_there_for_others_and_promised_to_nobody(device: Device) -> None:
    engine = Engine(device)
    owner = device.owner()
    assert (owner.private_now_bytes, owner.private_peak_bytes) == (PRIVATE, PRIVATE)
    engine.fall_asleep()
    owner = device.owner()
    assert (owner.private_now_bytes, owner.private_peak_bytes) == (CONTEXT, CONTEXT)
    assert owner.floor_applied == 2 * GIB, "its floor is lent"
    with device.other(CAPACITY - CONTEXT) as other:
        assert other.leased_bytes == CAPACITY - CONTEXT


def test_waking_waits_until_others_have_made_room_for_weights_and_floor(device: Device) -> None:
    engine = Engine(device)
    engine.fall_asleep()
    with device.other(CAPACITY - CONTEXT) as other:

        def give_back() -> None:
            assert device.owner().private_peak_bytes == CONTEXT, "nothing is promised while it waits"
            assert device.owner().starting_bytes == PRIVATE - CONTEXT + 2 * GIB
            other.give_back(granules_released=4 * GIB // GRANULE)
            device.free_bytes += 4 * GIB

        device.while_waiting = give_back
        engine.wake()
        assert device.now == pytest.approx(6 * 0.2) and other.leased_bytes == CAPACITY - CONTEXT - 24 * GIB
        owner = device.owner()
        assert (owner.private_now_bytes, owner.private_peak_bytes) == (PRIVATE, PRIVATE)
        assert (owner.starting_bytes, owner.queued_at_ms) == (0, 0)


def test_where_there_is_no_room_in_time_it_sleeps_on_and_costs_nobody_anything(device: Device) -> None:
    engine = Engine(device, start_seconds=7)
    engine.fall_asleep()
    for begun in (0, 7):
        with device.other(CAPACITY - CONTEXT - 5 * GIB):
            with pytest.raises(CapacityError, match=r"no room to wake up within 7 s: .* 16 GiB are missing"):
                engine.wake()
            assert device.now == pytest.approx(begun + 7)
            owner = device.owner()
            assert (owner.starting_bytes, owner.queued_at_ms, owner.private_peak_bytes) == (0, 0, CONTEXT)
        device.free_bytes = CAPACITY - CONTEXT
    engine.wake()
    assert device.now == pytest.approx(14) and device.owner().private_peak_bytes == PRIVATE


def test_beside_floors_that_leave_no_room_it_is_refused_at_once(device: Device) -> None:
    engine = Engine(device)
    engine.fall_asleep()
    with device.other(0, floor_bytes=70 * GIB), pytest.raises(CapacityError, match="70 GiB floors of other"):
        engine.wake()
    assert device.now == 0
    engine.wake()


def test_a_floor_that_was_set_while_it_slept_is_the_one_that_is_waited_for(device: Device) -> None:
    engine = Engine(device)
    engine.fall_asleep()
    engine.start.set_floor(5 * GIB)
    with device.other(CAPACITY - CONTEXT - 10 * GIB) as other:
        seen: list[int] = []

        def give_back() -> None:
            seen.append(device.owner().starting_bytes)
            other.give_back(granules_released=20 * GIB // GRANULE)
            device.free_bytes += 20 * GIB

        device.while_waiting = give_back
        engine.wake()
        assert seen == [PRIVATE - CONTEXT + 5 * GIB] and device.owner().floor_applied == 5 * GIB


def test_an_engine_alone_wakes_with_a_floor_of_the_whole_device(device: Device) -> None:
    """The engine does not wait for the part of its floor that it already holds."""
    engine = Engine(device)
    engine.start.account.describe(
        page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=CAPACITY // GRANULE, blocks_per_granule=8,
        block_count=1 << 16, stride_bytes=GRANULE // 8,
    )  # fmt: skip
    account = engine.start.account
    assert account.lease(GRANULE, device.memory()) == GRANULE
    account.created(1)
    device.free_bytes -= GRANULE
    engine.start.set_floor(CAPACITY - PRIVATE)
    engine.fall_asleep()
    engine.wake()
    assert device.now == 0
    account.give_back(granules_released=1)


def test_who_has_nothing_to_claim_does_not_wait(device: Device) -> None:
    engine = Engine(device)
    with device.other(device.free_bytes):
        engine.start.wait_to_wake(device.memory)
    assert device.now == 0
