"""A rank's start inside vLLM: its identity in the ledger, its claim, and its device."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import CapacityError, InvariantError
from kvcached_core.ledger import Account, OwnerSnapshot, Runtime, snapshot
from kvcached_core.startup.rank_start import CONTEXT_BYTES
from kvcached_core.units import GIB
from tests.vllm.engines import vllm_config
from vllm_kvcached import nvml, weights
from vllm_kvcached.starting import VllmRankStart
from vllm_kvcached.support import instance, settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CAPACITY = 80 * GIB
DEVICE = DeviceIdentity("GPU-1", "a device")


class Library(ModuleType):
    """A fake NVML with one device and these processes. Its calls work after nvmlInit()."""

    def __init__(self, *processes: tuple[int, int | None]) -> None:
        super().__init__("pynvml")
        self.processes = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]
        self.ready = False

    def nvmlInit(self) -> None:
        self.ready = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != DEVICE.uuid or not self.ready:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return self.processes

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(free=CAPACITY, total=CAPACITY)


def use(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace vLLM's NVML library by this one."""
    import vllm.third_party

    monkeypatch.setattr(vllm.third_party, "pynvml", library, raising=False)
    monkeypatch.setitem(sys.modules, "vllm.third_party.pynvml", library)
    stats = {"reserved_bytes": {"all": {"current": 15 * GIB}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of every engine in this file."""
    return vllm_config(tmp_path_factory.mktemp("model"))


class Device:
    """A device's ledger, and ranks that start on it."""

    def __init__(self, described: Any, folder: Path) -> None:
        self.described = described
        self._folder = folder
        self.runtime = Runtime.open(str(folder))
        self.starts: list[VllmRankStart] = []

    def start(self, **chosen: Any) -> VllmRankStart:
        options = {"runtime_dir": str(self._folder), "headroom": "0", **chosen}
        self.described.additional_config = {"kvcached": options}
        self.starts.append(VllmRankStart(self.described, settings(self.described), 3))
        return self.starts[-1]

    def entered(self, device: torch.device = CPU, **chosen: Any) -> VllmRankStart:
        """Return the start of a rank that is attached to the ledger."""
        start = self.start(**chosen)
        start.enter_with(device, DEVICE, CAPACITY, lambda: 0)
        return start

    def memory(self) -> MemoryInfo:
        return MemoryInfo(CAPACITY, CAPACITY)

    def owner(self) -> OwnerSnapshot:
        """Return the started rank's slot in a snapshot of the ledger."""
        (device,) = snapshot(self.runtime)
        return next(owner for owner in device.owners if owner.name != "other")


@pytest.fixture
def device(described: Any, tmp_path: Path) -> Iterator[Device]:
    """A device without engines."""
    made = Device(described, tmp_path / "run")
    yield made
    for start in made.starts:
        start.close()


@pytest.mark.parametrize(
    ("served", "setting", "name"),
    [(None, "", None), ("org/chat", "", "chat"), (["a", "b"], "", "a"), ("chat", "mine", "mine")],
)
def test_the_ledger_shows_the_identity_of_the_rank(
    device: Device, served: Any, setting: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.described.model_config, "served_model_name", served)
    device.entered(name=setting)
    owner, model = device.owner(), device.described.model_config.model
    assert (owner.engine, owner.rank, owner.name) == ("vllm", 3, name or Path(model).name)
    assert (owner.instance, owner.model) == (instance(device.described), model)


@pytest.mark.parametrize("on_host", [True, False])
def test_memory_that_loading_takes_is_estimated(device: Device, on_host: bool) -> None:
    start = device.start(floor="auto")
    start.enter_with(CPU, DEVICE, 1 << 50, lambda: 0)  # so large that the machine has no other memory
    start.wait_to_load(lambda: MemoryInfo(1 << 50, 1 << 50), on_host)
    owner, described = device.owner(), device.described
    assert owner.private_peak_bytes == weights.private_bytes(described, on_host)
    assert 0 < weights.longest_request_bytes(described) <= owner.floor_applied < 4 << 20


def test_a_setting_replaces_its_estimate(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    for estimate in ("private_bytes", "longest_request_bytes"):
        monkeypatch.setattr(weights, estimate, lambda *_: pytest.fail("nobody asked"))
    device.entered(start_size="10GiB", floor="2GiB").wait_to_load(device.memory, on_host=False)
    owner = device.owner()
    assert (owner.private_peak_bytes, owner.floor_applied) == (10 * GIB, 2 * GIB)


def test_a_small_share_refuses_a_large_process_on_a_device_only(device: Device) -> None:
    start = device.entered(start_size="10TiB", floor="2GiB")
    with pytest.raises(CapacityError, match="10 TiB outside its KV cache"):
        start.wait_to_load(device.memory, on_host=False)
    start.wait_to_load(device.memory, on_host=True)
    assert device.owner().private_peak_bytes <= CAPACITY - 2 * GIB


def test_the_limit_is_the_least_of_setting_and_vllm_option(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = device.entered(limit="50%")
    assert start.limit_bytes() == device.owner().limit_applied == CAPACITY // 2
    start.close()
    monkeypatch.setattr(device.described.cache_config, "kv_cache_memory_bytes", 1 << 20)
    start = device.entered(limit="50%", floor="auto", start_size="0")
    start.wait_to_load(device.memory, on_host=False)
    owner = device.owner()
    assert start.limit_bytes() == owner.limit_applied == owner.floor_applied == 1 << 20


def test_room_for_a_context_is_made_on_a_device_that_is_known_and_shared(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Library(), monkeypatch)
    monkeypatch.setattr(nvml, "current_platform", SimpleNamespace(get_device_uuid=lambda rank: f"GPU-{rank}"))
    other = Account.attach(device.runtime, DEVICE, CAPACITY, 0, instance="other", rank=0, name="other")
    with contextlib.ExitStack() as undo:
        undo.callback(other.detach)
        start = device.start(start_size="10GiB", floor="2GiB")
        start.make_room_on(0)
        with pytest.raises(InvariantError, match="entered with the device"):
            _ = start.account
        start.make_room_on(1)
        assert device.owner().private_peak_bytes == CONTEXT_BYTES
        start.enter_with(CPU, DEVICE, CAPACITY, lambda: 0)
        start.wait_to_load(device.memory, on_host=False)
        assert device.owner().private_peak_bytes == 10 * GIB


def test_without_the_library_no_room_is_made(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    use(library, monkeypatch)
    monkeypatch.setattr(library, "nvmlInit", lambda: 1 / 0)
    start = device.start()
    assert nvml.uuid_of(0) is None
    start.make_room_on(0)
    with pytest.raises(InvariantError, match="entered with the device"):
        _ = start.account


@pytest.mark.parametrize(
    ("processes", "beside_bytes"),
    [([(1, 70 * GIB), (os.getpid(), 18 * GIB)], 3 * GIB), ([], 0), ([(os.getpid(), None)], 0)],
)
def test_private_memory_is_torchs_and_the_context_if_the_driver_reports_it(
    device: Device,
    processes: list[tuple[int, int | None]],
    beside_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(Library(*processes), monkeypatch)
    assert device.entered(CUDA).private.measure() == 15 * GIB + beside_bytes


def test_private_memory_is_0_on_the_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Library((os.getpid(), 18 * GIB)), monkeypatch)
    assert device.entered(CPU).private.measure() == 0


def test_private_memory_without_the_library_is_torchs(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library((os.getpid(), 18 * GIB))
    use(library, monkeypatch)
    monkeypatch.setattr(library, "nvmlInit", lambda: 1 / 0)
    assert device.entered(CUDA).private.measure() == 15 * GIB
