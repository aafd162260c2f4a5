"""A rank's start in the ledger: its claims, refusals, and the figures that others see meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached_core import config
from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import CapacityError, ConfigError, InvariantError
from kvcached_core.ledger import Account, OwnerSnapshot, Runtime, snapshot
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.startup.rank_start import CONTEXT_BYTES, RankIdentity, RankStartup
from kvcached_core.units import GIB, MIB

CAPACITY, GRANULE = 80 * GIB, 16 * MIB
DEVICE = DeviceIdentity("GPU-1", "a device")


def no_private_memory() -> PrivateMemory:
    """Return the private memory of a process that uses none."""
    return PrivateMemory(None, lambda: 0, lambda: 0)


class Device:
    """A device, a ledger of it, and engines that start on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.runtime = Runtime.open(str(folder))
        self.free_bytes = CAPACITY
        self.machine_bytes = 1000 * GIB
        self.while_waiting: Callable[[], None] = lambda: None
        self.now = 0.0
        self.engine_lives = True
        self.starts: list[RankStartup] = []

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.free_bytes, CAPACITY)

    def start(self, **chosen: Any) -> RankStartup:
        """Return a start whose clock moves while it waits."""
        options = {"runtime_dir": str(self._folder), "headroom": "0", "floor": "2GiB", **chosen}
        who = RankIdentity("engine", f"engine-{len(self.starts)}", 0, "models/m/", "models/m")
        start = RankStartup(
            config.load(options, {}), who, lambda mine: [mine], lambda: MemoryInfo(self.machine_bytes, 0),
            lambda: self.now, self._wait, lambda: self.engine_lives,
        )  # fmt: skip
        self.starts.append(start)
        return start

    def entered(self, **chosen: Any) -> RankStartup:
        """Return a start that is in the ledger."""
        start = self.start(**chosen)
        start.enter(DEVICE, CAPACITY, no_private_memory(), lambda: 0)
        return start

    def _wait(self, fd: int, seconds: float) -> None:
        self.now += seconds
        self.while_waiting()

    @contextlib.contextmanager
    def other(self, leased_bytes: int, **arguments: Any) -> Iterator[Account]:
        """Attach another engine first, with memory that exists."""
        account = Account.attach(
            self.runtime, DEVICE, CAPACITY, 0, instance="other", rank=0, name="other", **arguments
        )
        account.describe(page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=CAPACITY // GRANULE,
                         blocks_per_granule=8, block_count=1 << 16, stride_bytes=2 * MIB)  # fmt: skip
        if leased_bytes:
            assert account.lease(leased_bytes, self.memory()) == leased_bytes
            account.created(leased_bytes // GRANULE)
            self.free_bytes -= leased_bytes
        yield account
        account.give_back(granules_released=account.ready_bytes // GRANULE)
        account.detach()

    def owner(self) -> OwnerSnapshot:
        """Return the ledger's snapshot of the engine that was started."""
        (device,) = snapshot(self.runtime)
        return next(owner for owner in device.owners if owner.name != "other")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device that nobody uses."""
    made = Device(tmp_path / "run")
    yield made
    for start in made.starts:
        start.close()


def test_what_was_promised_at_the_start_is_seen_by_all(device: Device) -> None:
    start = device.entered()
    start.wait_for_room(device.memory, 10 * GIB, GIB, on_host=False)  # the floor that was set is used
    owner = device.owner()
    assert (owner.private_peak_bytes, owner.floor_applied) == (10 * GIB, 2 * GIB), (
        "a floor that is set counts"
    )
    assert (owner.name, owner.engine, owner.model) == ("m", "engine", "models/m")
    start.end(GIB)
    assert device.owner().private_peak_bytes == GIB, "what was loaded is the system's to count"


@pytest.mark.parametrize(("headroom", "said"), [("80GiB", "80 GiB"), ("100%", "80 GiB"), ("1TiB", "1 TiB")])
def test_a_headroom_that_leaves_nothing_is_refused_and_no_ledger_is_made(
    device: Device, headroom: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"KVCACHED_HEADROOM\) of {said}: expected less than the 80 GiB"):
        device.entered(headroom=headroom)
    assert not list(device.runtime.path.glob("*/ledger"))
    device.entered(headroom="79GiB")


@pytest.mark.parametrize(("limit", "floor"), [("100%", 3 * GIB), ("1GiB", GIB)])
def test_a_floor_that_is_not_set_is_estimated_within_the_limit_and_then_exact(
    device: Device, limit: str, floor: int
) -> None:
    start = device.entered(floor="auto", limit=limit)
    assert start.limit_bytes() == min(CAPACITY, GIB if limit == "1GiB" else CAPACITY)
    start.wait_for_room(device.memory, 0, 3 * GIB, on_host=False)
    assert device.owner().floor_applied == floor
    start.set_floor(GIB // 2)
    assert device.owner().floor_applied == GIB // 2
    with pytest.raises(CapacityError, match=r"floor of 81 GiB does not fit"):
        start.set_floor(81 * GIB)


def test_a_size_that_is_set_is_claimed_instead_of_the_estimate(device: Device) -> None:
    device.entered(start_size="7GiB").wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
    assert device.owner().private_peak_bytes == 7 * GIB


def test_what_the_process_has_already_is_in_its_peak_and_not_asked_for(device: Device) -> None:
    start = device.start()
    start.enter(DEVICE, CAPACITY, PrivateMemory(lambda: GIB, lambda: 0, lambda: 0), lambda: 0)
    start.wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
    assert device.owner().private_peak_bytes == 11 * GIB


def test_an_engine_waits_until_another_has_given_back(device: Device) -> None:
    with device.other(75 * GIB) as other:
        start = device.entered()

        def give_back() -> None:
            assert device.owner().private_peak_bytes == 0, "nothing is promised while it waits"
            if device.now > 1.0 and other.leased_bytes > 60 * GIB:
                other.give_back(granules_released=15 * GIB // GRANULE)
                device.free_bytes += 15 * GIB

        device.while_waiting = give_back
        start.wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
        assert 1.0 < device.now < 1.5 and device.owner().private_peak_bytes == 10 * GIB


def test_an_engine_that_does_not_fit_in_time_is_refused_and_leaves(device: Device) -> None:
    with device.other(75 * GIB):
        start = device.entered(start_seconds=7)
        with pytest.raises(CapacityError, match=r"within 7 s: .* 7 GiB are missing"):
            start.wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
        assert device.now == pytest.approx(7)
        start.close()
        assert [owner.name for owner in snapshot(device.runtime)[0].owners if owner.live] == ["other"]


def test_a_rank_whose_engine_has_died_waits_no_longer(device: Device) -> None:
    with device.other(75 * GIB):
        start = device.entered()
        device.engine_lives = False
        with pytest.raises(SystemExit, match="has ended"):
            start.wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
        assert device.now <= 0.2


def test_an_engine_that_can_never_fit_is_refused_at_once(device: Device) -> None:
    with device.other(0, floor_bytes=75 * GIB):
        start = device.entered()
        with pytest.raises(CapacityError, match="10 GiB outside its KV cache"):
            start.wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
        assert device.now == 0


@pytest.mark.parametrize(
    ("machine_bytes", "claimed"),
    [
        (CAPACITY + 20 * GIB, 0),  # the rest of the machine is enough: nothing is claimed
        (CAPACITY + 4 * GIB, 6 * GIB),
        (CAPACITY // 2, 10 * GIB),
    ],
)
def test_on_the_host_only_what_is_shared_is_claimed(device: Device, machine_bytes: int, claimed: int) -> None:
    device.machine_bytes = machine_bytes
    start = device.entered()
    start.wait_for_room(device.memory, 10 * GIB, 0, on_host=True)
    assert device.owner().private_peak_bytes == claimed
    start.end(0)
    assert device.owner().private_peak_bytes == 0


def test_on_the_host_a_small_share_is_no_reason_to_refuse_a_large_process(device: Device) -> None:
    device.machine_bytes = GIB
    device.entered().wait_for_room(device.memory, 200 * GIB, 0, on_host=True)
    assert device.owner().private_peak_bytes == CAPACITY - 2 * GIB


def test_room_for_a_context_is_waited_for_where_others_hold_memory(device: Device) -> None:
    with device.other(CAPACITY - GRANULE) as other:
        start = device.start()

        def give_back() -> None:
            if other.leased_bytes > 60 * GIB:
                other.give_back(granules_released=20 * GIB // GRANULE - 1)
                device.free_bytes += 20 * GIB - GRANULE

        device.while_waiting = give_back
        start.make_room_for_context(DEVICE.uuid, device.memory)
        assert 0 < device.now < 1 and device.owner().private_peak_bytes == CONTEXT_BYTES
        device.free_bytes -= CONTEXT_BYTES // 2  # the context
        account = start.account
        start.enter(DEVICE, CAPACITY, no_private_memory(), lambda: 0)
        assert start.account is account
        start.wait_for_room(device.memory, 10 * GIB, 0, on_host=False)
        assert device.owner().private_peak_bytes == 10 * GIB


def test_a_device_that_nobody_shares_needs_no_room_made(device: Device) -> None:
    start = device.start()
    start.make_room_for_context(DEVICE.uuid, device.memory)
    for ask in (lambda: start.account, lambda: start.private, start.limit_bytes):
        with pytest.raises(InvariantError, match="entered with the device"):
            ask()


def test_if_it_was_another_device_that_one_is_left(device: Device) -> None:
    with device.other(GIB):
        start = device.start()
        start.make_room_for_context(DEVICE.uuid, device.memory)
        start.enter(DeviceIdentity("GPU-2", ""), CAPACITY, no_private_memory(), lambda: 0)
        live = {d.uuid: [o.name for o in d.owners if o.live] for d in snapshot(device.runtime)}
        assert live["GPU-1"] == ["other"] and len(live["GPU-2"]) == 1


def test_a_device_has_one_name_for_all_engines_on_it_and_another_on_each_machine(tmp_path: Path) -> None:
    here, there = Device(tmp_path / "here"), Device(tmp_path / "there")
    keys = [start.account.device_key for start in (here.entered(), here.entered(), there.entered())]
    assert keys[0] == keys[1] != keys[2]
    assert all(key.startswith(DEVICE.uuid) for key in keys), "in the order of devices"
    for start in (*here.starts, *there.starts):
        start.close()
