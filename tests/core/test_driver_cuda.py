"""The cuda driver: against modules that record and fail its calls, and on a GPU where there is one."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from devkit.report import record
from kvcached_core.driver.base import Driver, MemoryInfo
from kvcached_core.driver.registry import open_driver
from kvcached_core.errors import CapacityError, DriverError, InvariantError, UnsupportedError
from tests.core.fake_gpu import OWN_STREAM, PAGE, FakeGpu, binding_modules, cupy_module

MODULE = "kvcached_core.driver.cuda"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Return a GPU that consists of fake modules."""
    gpu = FakeGpu()
    for name, module in {**binding_modules(gpu), "cupy": cupy_module(gpu)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield gpu
    sys.modules.pop(MODULE, None)


@pytest.fixture
def driver(gpu: FakeGpu) -> Driver:
    """Return the driver on that GPU, its start-up calls forgotten."""
    driver = open_driver("cuda")
    gpu.calls.clear()
    return driver


def test_identity_is_the_uuid_as_people_know_it(
    gpu: FakeGpu, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driver.identity() == ("GPU-00112233-4455-6677-8899-aabbccddeeff", "NVIDIA H100 80GB HBM3")
    gpu.name = b"NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    assert driver.identity().uuid == "MIG-00112233-4455-6677-8899-aabbccddeeff"
    gpu.name = b"NVIDIA A100-SXM4-40GB"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-00112233-4455-6677-8899-aabbccddeeff")
    assert driver.identity().uuid.startswith("MIG-")


def test_a_device_without_virtual_memory_is_refused_with_a_sentence(gpu: FakeGpu) -> None:
    gpu.supported = 0
    with pytest.raises(
        UnsupportedError, match=r"H100 80GB HBM3.*no virtual memory management: run the engine"
    ):
        open_driver("cuda")


def test_no_device_and_no_package_are_refused_with_a_sentence(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.fail["use", 0] = 100
    with pytest.raises(UnsupportedError, match="CUDA device 3 cannot be used: use failed with status 100"):
        open_driver("cuda", 3)
    sys.modules.pop(MODULE, None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match="install the extra cuda12 or cuda13"):
        open_driver("cuda")


def test_map_grants_access_and_zeroes_on_the_stream_last(gpu: FakeGpu, driver: Driver) -> None:
    address, handle = driver.reserve(4 * PAGE), driver.create(PAGE)
    gpu.calls.clear()
    driver.map(address, PAGE, [handle], stream=42)
    assert gpu.names() == ["cuMemMap", "cuMemSetAccess", "memsetAsync"]
    assert gpu.calls[-1][1] == (address, 0, PAGE, 42)
    driver.alias(address + PAGE, PAGE, handle)
    assert gpu.names()[3:] == ["cuMemMap", "cuMemSetAccess"], "an alias keeps the contents"


def test_a_row_of_pages_is_given_access_zeroed_and_unmapped_in_one_call(gpu: FakeGpu, driver: Driver) -> None:
    address, handles = driver.reserve(4 * PAGE), [driver.create(PAGE) for _ in range(3)]
    gpu.calls.clear()
    driver.map(address + PAGE, PAGE, handles, stream=42)
    assert gpu.names() == ["cuMemMap"] * 3 + ["cuMemSetAccess", "memsetAsync"]
    assert gpu.calls[-2][1][:2] == (address + PAGE, 3 * PAGE)
    assert gpu.calls[-1][1] == (address + PAGE, 0, 3 * PAGE, 42)
    assert gpu.mapped == {address + (1 + n) * PAGE: handle for n, handle in enumerate(handles)}
    driver.unmap(address + 2 * PAGE, PAGE, 2)
    assert gpu.calls[-1] == ("cuMemUnmap", (address + 2 * PAGE, 2 * PAGE))
    driver.map(address + 2 * PAGE, PAGE, handles[:0:-1])
    driver.unmap(address + PAGE, PAGE, 3)
    assert not gpu.mapped
    for handle in handles:
        driver.release(handle)


@pytest.mark.parametrize(
    ("call", "nth"), [("cuMemMap", 1), ("cuMemMap", 3), ("cuMemSetAccess", 1), ("memsetAsync", 1)]
)
@pytest.mark.parametrize(("status", "error"), [(2, CapacityError), (700, DriverError)])
def test_i8_a_map_that_fails_half_way_is_undone(
    gpu: FakeGpu, driver: Driver, call: str, nth: int, status: int, error: type[Exception]
) -> None:
    address, handles = driver.reserve(4 * PAGE), [driver.create(PAGE) for _ in range(3)]
    gpu.fail[call, nth] = status
    with pytest.raises(error, match=call):
        driver.map(address, PAGE, handles)
    assert not gpu.mapped
    driver.map(address, PAGE, handles)
    driver.unmap(address, PAGE, 3)
    for handle in handles:
        driver.release(handle)
    assert not gpu.handles
    record("driver.injected_failures", 1)


VERBS: dict[str, Callable[[Driver, int, int, int], Any]] = {
    "cuMemAddressReserve": lambda d, a, mapped, idle: d.reserve(PAGE),
    "cuMemAddressFree": lambda d, a, mapped, idle: d.unreserve(d.reserve(PAGE), PAGE),
    "cuMemCreate": lambda d, a, mapped, idle: d.create(PAGE),
    "cuMemRelease": lambda d, a, mapped, idle: d.release(idle),
    "cuMemUnmap": lambda d, a, mapped, idle: d.unmap(a, PAGE),
    "Event": lambda d, a, mapped, idle: d.record(5),
    "eventRecord": lambda d, a, mapped, idle: d.record(5),
    "eventQuery": lambda d, a, mapped, idle: d.passed(d.record(5)),
    "streamWaitEvent": lambda d, a, mapped, idle: d.follow(5, d.record(d.own_stream())),
    "deviceSynchronize": lambda d, a, mapped, idle: d.synchronize(),
    "memGetInfo": lambda d, a, mapped, idle: d.memory(),
}


@pytest.mark.parametrize("call", VERBS)
@pytest.mark.parametrize(("status", "error"), [(2, CapacityError), (700, DriverError)])
def test_i8_a_failed_call_is_typed_and_changes_nothing(
    gpu: FakeGpu, driver: Driver, call: str, status: int, error: type[Exception]
) -> None:
    address, mapped, idle = driver.reserve(4 * PAGE), driver.create(PAGE), driver.create(PAGE)
    driver.map(address, PAGE, [mapped])
    before = (set(gpu.handles), dict(gpu.mapped))
    gpu.fail[call, 0] = status
    with pytest.raises(error, match=call) as caught:
        VERBS[call](driver, address, mapped, idle)
    if isinstance(caught.value, DriverError):
        assert (caught.value.call, caught.value.status) == (call, status)
    assert (gpu.handles, gpu.mapped) == before
    gpu.fail.clear()
    VERBS[call](driver, address, mapped, idle)
    driver.close()
    assert not gpu.handles and not gpu.mapped
    record("driver.injected_failures", 1)


def test_close_frees_all_even_where_an_unmap_fails(gpu: FakeGpu, driver: Driver) -> None:
    address = driver.reserve(4 * PAGE)
    for index in range(3):
        driver.map(address + index * PAGE, PAGE, [driver.create(PAGE)])
    gpu.fail["cuMemUnmap", 2] = 700
    driver.close()
    driver.close()
    assert not gpu.handles and len(gpu.mapped) == 1


def test_i6_a_fence_passes_with_its_event_and_a_dead_device_is_an_error(gpu: FakeGpu, driver: Driver) -> None:
    gpu.event_status = 600
    fence = driver.record(9)
    assert ("eventRecord", (77, 9)) in gpu.calls
    assert driver.passed(fence) is False
    gpu.event_status = 0
    assert driver.passed(fence) is True
    gpu.event_status = 700
    with pytest.raises(DriverError, match="eventQuery failed with status 700"):
        driver.passed(fence)


def test_a_stream_follows_the_zeroing_on_the_drivers_own(gpu: FakeGpu, driver: Driver) -> None:
    address, handle = driver.reserve(4 * PAGE), driver.create(PAGE)
    driver.map(address, PAGE, [handle], driver.own_stream())
    driver.follow(9, driver.record(driver.own_stream()))
    calls = [call for call in gpu.calls if call[0] in ("memsetAsync", "eventRecord", "streamWaitEvent")]
    assert calls == [
        ("memsetAsync", (address, 0, PAGE, OWN_STREAM)),
        ("eventRecord", (77, OWN_STREAM)),
        ("streamWaitEvent", (9, 77)),
    ]


@pytest.mark.parametrize(("status", "error"), [(2, CapacityError), (700, DriverError)])
def test_a_device_that_gives_no_stream_fails_with_a_typed_error(
    gpu: FakeGpu, status: int, error: type[Exception]
) -> None:
    gpu.fail["Stream", 1] = status
    with pytest.raises(error, match="Stream"):
        open_driver("cuda")


def test_a_tensor_is_a_view_of_the_range(gpu: FakeGpu, driver: Driver) -> None:
    address = driver.reserve(4 * PAGE)
    tensor = driver.tensor(address, 3 * PAGE)
    assert gpu.calls[-1] == ("ndarray", ((3 * PAGE,), "int8", ((address, 3 * PAGE, 0), 0)))
    assert tensor.shape == (3 * PAGE,) and tensor.dtype == torch.int8


def test_a_thread_gets_the_device_made_current_where_a_call_goes_to_the_current_one(
    gpu: FakeGpu, driver: Driver
) -> None:
    address, handle = driver.reserve(PAGE), driver.create(PAGE)
    verbs: list[Callable[[], object]] = [
        lambda: driver.map(address, PAGE, [handle]),
        lambda: driver.record(0),
        lambda: driver.follow(0, types.SimpleNamespace(ptr=77)),
        lambda: driver.passed(types.SimpleNamespace(ptr=77)),
        driver.memory,
        driver.synchronize,
    ]
    for verb in verbs:
        gpu.calls.clear()
        thread = threading.Thread(target=verb)
        thread.start()
        thread.join(10)
        assert next(name for name, _ in gpu.calls) == "use" and len(gpu.calls) > 1
    gpu.calls.clear()
    driver.unmap(address, PAGE)
    driver.release(handle)
    driver.create(PAGE)
    names = [name for name, _ in gpu.calls]
    assert names == ["cuMemUnmap", "cuMemRelease", "cuMemCreate"], "each call gives Python's lock away"


def test_memory_is_the_devices_or_what_the_capacity_leaves(gpu: FakeGpu, driver: Driver) -> None:
    assert driver.memory() == MemoryInfo(8 << 30, 16 << 30)
    capped = open_driver("cuda", capacity_bytes=2 * PAGE)
    handle = capped.create(PAGE)
    assert capped.memory() == MemoryInfo(PAGE, 2 * PAGE)
    capped.create(PAGE)
    with pytest.raises(CapacityError, match="over the capacity"):
        capped.create(PAGE)
    capped.release(handle)
    assert capped.memory().free_bytes == PAGE


def test_misuse_never_reaches_the_device(gpu: FakeGpu, driver: Driver) -> None:
    address, handle = driver.reserve(4 * PAGE), driver.create(PAGE)
    driver.map(address, PAGE, [handle])
    gpu.calls.clear()
    misuses: list[Callable[[], object]] = [
        lambda: driver.release(handle),
        lambda: driver.clean(handle),
        lambda: driver.unmap(address + PAGE, PAGE),
        lambda: driver.map(address + PAGE, PAGE, [handle]),
        lambda: driver.unreserve(address, 4 * PAGE),
    ]
    for misuse in misuses:
        with pytest.raises(InvariantError):
            misuse()
    assert not gpu.names()
