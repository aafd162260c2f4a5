"""A fake GPU: fake CuPy and cuda.bindings modules that record the cuda driver's calls and can fail them."""

from __future__ import annotations

import enum
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch

PAGE = 2 << 20
OWN_STREAM = 55
RAW_UUID = bytes.fromhex("00112233445566778899aabbccddeeff")


class CUresult(enum.IntEnum):
    """The statuses that matter."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class CUDARuntimeError(RuntimeError):
    """CuPy's error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class FakeGpu:
    """Records (name, arguments) of each call of either module; `fail` holds {(name, n): status}."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: dict[tuple[str, int], int] = {}
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.free_bytes = 8 << 30
        self.supported = 1
        self.name = b"NVIDIA H100 80GB HBM3"
        self.event_status = 0
        self._numbers = itertools.count(100)

    def names(self) -> list[str]:
        """Return the names of all calls that change something."""
        return [name for name, _ in self.calls if name != "use"]

    def bound(self, name: str, effect: Callable[..., Any], driver: bool) -> Callable[..., Any]:
        """Return a function as cuda.bindings (a tuple with a status) or CuPy (a value, or raises) has it."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments))
            status = self.fail.get((name, sum(n == name for n, _ in self.calls)), 0)
            status = status or self.fail.get((name, 0), 0)  # 0: every call
            if status and not driver:
                raise CUDARuntimeError(status)
            if status:
                return (CUresult(status), None)
            value = effect(*arguments, **options)
            return (
                ((CUresult.CUDA_SUCCESS,) if value is None else (CUresult.CUDA_SUCCESS, value))
                if driver
                else value
            )

        call.__name__ = name
        return call

    def create(self, size: int, properties: Any, flags: int) -> int:
        """Create a handle on the right device."""
        assert properties.location.id == 0 and flags == 0 and size % PAGE == 0
        handle = next(self._numbers)
        self.handles.add(handle)
        return handle

    def map(self, address: int, size: int, offset: int, handle: int, flags: int) -> None:
        """Map a page; fail on any misuse."""
        assert handle in self.handles and address not in self.mapped
        self.mapped[address] = handle

    def unmap(self, address: int, size: int) -> None:
        """Unmap pages in a row; fail on any misuse."""
        for page in range(address, address + size, PAGE):
            del self.mapped[page]

    def release(self, handle: int) -> None:
        """Release a handle; fail on any misuse."""
        self.handles.remove(handle)


def binding_modules(gpu: FakeGpu) -> dict[str, types.ModuleType]:
    """Return fake `cuda`, `cuda.bindings` and `cuda.bindings.driver`."""
    addresses = itertools.count(1 << 40, 1 << 40)
    effects: dict[str, Callable[..., Any]] = {
        "cuDeviceGet": lambda index: index,
        "cuDeviceGetAttribute": lambda attribute, device: gpu.supported,
        "cuDeviceGetName": lambda length, device: gpu.name + bytes(length - len(gpu.name)),
        "cuDeviceGetUuid": lambda device: types.SimpleNamespace(bytes=RAW_UUID),
        "cuMemGetAllocationGranularity": lambda properties, option: PAGE,
        "cuMemAddressReserve": lambda size, alignment, address, flags: next(addresses),
        "cuMemAddressFree": lambda address, size: None,
        "cuMemCreate": gpu.create,
        "cuMemRelease": gpu.release,
        "cuMemMap": gpu.map,
        "cuMemUnmap": gpu.unmap,
        "cuMemSetAccess": lambda address, size, access, count: None,
    }
    driver: Any = types.ModuleType("cuda.bindings.driver")
    for name, effect in effects.items():
        setattr(driver, name, gpu.bound(name, effect, driver=True))

    def record_type() -> Any:
        return types.SimpleNamespace(location=types.SimpleNamespace())

    driver.CUresult = CUresult
    driver.CUmemAllocationProp = driver.CUmemAccessDesc = record_type
    for name in ("CUmemAllocationType", "CUmemAccess_flags", "CUmemLocationType"):
        setattr(driver, name, AnyName())
    driver.CUmemAllocationGranularity_flags = driver.CUdevice_attribute = AnyName()
    bindings: Any = types.ModuleType("cuda.bindings")
    bindings.driver = driver
    return {"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.driver": driver}


class AnyName:
    """An enumeration that has every name."""

    def __getattr__(self, name: str) -> str:
        return name


def cupy_module(gpu: FakeGpu) -> types.ModuleType:
    """Return a fake `cupy`."""
    effects: dict[str, Callable[..., Any]] = {
        "free": lambda pointer: None,
        "memGetInfo": lambda: (gpu.free_bytes, 16 << 30),
        "memsetAsync": lambda address, value, size, stream: None,
        "eventRecord": lambda event, stream: None,
        "eventQuery": lambda event: gpu.event_status,
        "streamWaitEvent": lambda stream, event: None,
        "deviceSynchronize": lambda: None,
    }
    runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError)
    for name, effect in effects.items():
        setattr(runtime, name, gpu.bound(name, effect, driver=False))
    use = gpu.bound("use", lambda: None, driver=False)

    def stream(non_blocking: bool) -> Any:
        assert non_blocking, "else it would wait for the default stream, and the default stream for it"
        return types.SimpleNamespace(ptr=OWN_STREAM)

    def event(block: bool, disable_timing: bool) -> Any:
        return types.SimpleNamespace(ptr=77)

    module: Any = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=lambda index: types.SimpleNamespace(use=use),
        UnownedMemory=lambda address, size, owner, device: (address, size, device),
        MemoryPointer=lambda memory, offset: (memory, offset),
        Stream=gpu.bound("Stream", stream, driver=False),
        Event=gpu.bound("Event", event, driver=False),
    )
    module.int8 = "int8"

    def ndarray(shape: tuple[int], dtype: str, memptr: Any) -> Any:
        gpu.calls.append(("ndarray", (shape, dtype, memptr)))
        return torch.ones(shape, dtype=torch.int8)  # anything that speaks DLPack

    module.ndarray = ndarray
    return module  # type: ignore[no-any-return]
