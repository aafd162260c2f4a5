"""A rank's way into the ledger: what it claims, when it is refused, what others see meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import CapacityError, InvariantError
from kvcached_core.ledger import Account, OwnerSnapshot, Runtime, snapshot
from kvcached_core.start import CONTEXT_BYTES
from kvcached_core.units import GIB, MIB
from tests.vllm.engines import vllm_config
from vllm_kvcached import nvml
from vllm_kvcached.starting import Start
from vllm_kvcached.support import settings

CPU = torch.device("cpu")
CAPACITY, GRANULE = 80 * GIB, 16 * MIB
DEVICE = DeviceIdentity("GPU-1", "a device")
LENGTHY = 2 * 2**20  # what one request of the maximum length of the model below takes, and a tenth


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One configuration for all engines here."""
    return vllm_config(tmp_path_factory.mktemp("model"))


class Device:
    """A device, a ledger of it, and engines that start on it."""

    def __init__(self, described: Any, folder: Path) -> None:
        self._described = described
        self._folder = folder
        self.runtime = Runtime.open(str(folder))
        self.free_bytes = CAPACITY
        self.machine_bytes = 1000 * GIB
        self.while_waiting: Callable[[], None] = lambda: None
        self.now = 0.0
        self.engine_lives = True
        self.starts: list[Start] = []

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.free_bytes, CAPACITY)

    def start(self, **chosen: Any) -> Start:
        """Return a start whose clock moves while it waits."""
        self._described.instance_id = f"engine-{len(self.starts)}"
        options = {"runtime_dir": str(self._folder), "headroom": "0", "floor": "2GiB", **chosen}
        self._described.additional_config = {"kvcached": options}
        start = Start(
            self._described, settings(self._described), 0,
            lambda: MemoryInfo(self.machine_bytes, 0), lambda: self.now, self._wait,
            lambda: self.engine_lives,
        )  # fmt: skip
        self.starts.append(start)
        return start

    def entered(self, **chosen: Any) -> Start:
        """Return a start that is in the ledger."""
        start = self.start(**chosen)
        start.enter(CPU, DEVICE, CAPACITY, lambda: 0)
        return start

    def _wait(self, fd: int, seconds: float) -> None:
        self.now += seconds
        self.while_waiting()

    @contextlib.contextmanager
    def other(self, leased_bytes: int, **arguments: Any) -> Iterator[Account]:
        """An engine that is there before, with memory that exists."""
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

    def owner(self, name: str = "m") -> OwnerSnapshot:
        """Return what the ledger shows of the engine that was started last."""
        (device,) = snapshot(self.runtime)
        return next(owner for owner in device.owners if owner.name != "other")


@pytest.fixture
def device(described: Any, tmp_path: Path) -> Iterator[Device]:
    """A device that nobody uses."""
    made = Device(described, tmp_path / "run")
    yield made
    for start in made.starts:
        start.close()


def test_what_was_promised_at_the_start_is_seen_by_all(device: Device) -> None:
    start = device.entered(start_size="10GiB")
    start.wait_for_room(device.memory, on_host=False)
    owner = device.owner()
    assert (owner.private_peak_bytes, owner.floor_applied) == (10 * GIB, 2 * GIB)
    start.end(GIB)
    assert device.owner().private_peak_bytes == GIB, "what was loaded is the system's to count"


def test_an_engine_waits_until_another_has_given_back(device: Device) -> None:
    with device.other(75 * GIB) as other:
        start = device.entered(start_size="10GiB")

        def give_back() -> None:
            assert device.owner().private_peak_bytes == 0, "nothing is promised while it waits"
            if device.now > 1.0 and other.leased_bytes > 60 * GIB:
                other.give_back(granules_released=15 * GIB // GRANULE)
                device.free_bytes += 15 * GIB

        device.while_waiting = give_back
        start.wait_for_room(device.memory, on_host=False)
        assert 1.0 < device.now < 1.5 and device.owner().private_peak_bytes == 10 * GIB


def test_an_engine_that_does_not_fit_in_time_is_refused_and_leaves(device: Device) -> None:
    with device.other(75 * GIB):
        start = device.entered(start_size="10GiB", start_seconds=7)
        with pytest.raises(CapacityError, match=r"within 7 s: .* 7 GiB are missing"):
            start.wait_for_room(device.memory, on_host=False)
        assert device.now == pytest.approx(7)
        start.close()
        assert [owner.name for owner in snapshot(device.runtime)[0].owners if owner.live] == ["other"]


def test_a_worker_whose_engine_has_died_waits_no_longer(device: Device) -> None:
    with device.other(75 * GIB):
        start = device.entered(start_size="10GiB")
        device.engine_lives = False
        with pytest.raises(SystemExit, match="has ended"):
            start.wait_for_room(device.memory, on_host=False)
        assert device.now <= 0.2


def test_an_engine_that_can_never_fit_is_refused_at_once(device: Device) -> None:
    with device.other(0, floor_bytes=75 * GIB):
        start = device.entered(start_size="10GiB")
        with pytest.raises(CapacityError, match="10 GiB outside its KV cache"):
            start.wait_for_room(device.memory, on_host=False)
        assert device.now == 0


def test_the_floor_is_estimated_before_the_geometry_is_known_and_then_exact(device: Device) -> None:
    start = device.entered(start_size="0", floor="auto")
    start.wait_for_room(device.memory, on_host=False)
    assert LENGTHY < device.owner().floor_applied < 1.2 * LENGTHY
    start.set_floor(LENGTHY)
    assert device.owner().floor_applied == LENGTHY
    with pytest.raises(CapacityError, match=r"floor of 81 GiB does not fit"):
        start.set_floor(81 * GIB)


@pytest.mark.parametrize(
    ("machine_bytes", "claimed"),
    [
        (CAPACITY + 20 * GIB, 0),  # enough beside what engines share
        (CAPACITY + 4 * GIB, 6 * GIB),
        (CAPACITY // 2, 10 * GIB),
    ],
)
def test_on_the_host_only_what_is_shared_is_claimed(device: Device, machine_bytes: int, claimed: int) -> None:
    device.machine_bytes = machine_bytes
    start = device.entered(start_size="10GiB")
    start.wait_for_room(device.memory, on_host=True)
    assert device.owner().private_peak_bytes == claimed
    start.end(0)
    assert device.owner().private_peak_bytes == 0


def test_on_the_host_a_small_share_is_no_reason_to_refuse_a_large_process(device: Device) -> None:
    device.machine_bytes = GIB
    device.entered(start_size="200GiB").wait_for_room(device.memory, on_host=True)
    assert device.owner().private_peak_bytes == CAPACITY - 2 * GIB


def test_room_for_a_context_is_waited_for_where_others_hold_memory(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "uuid_of", lambda rank: DEVICE.uuid)
    monkeypatch.setattr(nvml, "memory_of", lambda uuid: device.memory())
    with device.other(CAPACITY - GRANULE) as other:
        start = device.start(start_size="10GiB")

        def give_back() -> None:
            if other.leased_bytes > 60 * GIB:
                other.give_back(granules_released=20 * GIB // GRANULE - 1)
                device.free_bytes += 20 * GIB - GRANULE

        device.while_waiting = give_back
        start.make_room_for_context(0)
        assert 0 < device.now < 1 and device.owner().private_peak_bytes == CONTEXT_BYTES
        device.free_bytes -= CONTEXT_BYTES // 2  # the context
        account = start.account
        start.enter(CPU, DEVICE, CAPACITY, lambda: 0)
        assert start.account is account
        start.wait_for_room(device.memory, on_host=False)
        assert device.owner().private_peak_bytes == 10 * GIB


def test_a_device_that_nobody_shares_needs_no_room_made(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uuid in (None, DEVICE.uuid):
        monkeypatch.setattr(nvml, "uuid_of", lambda rank, uuid=uuid: uuid)
        start = device.start()
        start.make_room_for_context(0)
        with pytest.raises(InvariantError, match="entered with the device"):
            _ = start.account


def test_if_it_was_another_device_that_one_is_left(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "uuid_of", lambda rank: DEVICE.uuid)
    monkeypatch.setattr(nvml, "memory_of", lambda uuid: device.memory())
    with device.other(GIB):
        start = device.start()
        start.make_room_for_context(0)
        start.enter(CPU, DeviceIdentity("GPU-2", ""), CAPACITY, lambda: 0)
        live = {d.uuid: [o.name for o in d.owners if o.live] for d in snapshot(device.runtime)}
        assert live["GPU-1"] == ["other"] and len(live["GPU-2"]) == 1


def test_the_limit_is_the_least_of_what_was_said(device: Device, described: Any) -> None:
    start = device.start(limit="50%")
    assert start.limit_bytes(10 * GIB) == 5 * GIB
    described.cache_config.kv_cache_memory_bytes = GIB
    try:
        assert start.limit_bytes(10 * GIB) == GIB
    finally:
        described.cache_config.kv_cache_memory_bytes = None
