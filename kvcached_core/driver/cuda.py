"""CUDA memory: virtual memory calls of cuda.bindings; device, events and arrays of CuPy.

This module is imported only when the driver is opened, because both packages are heavy.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import cupy
from cuda.bindings import driver as cu

from kvcached_core.driver.base import DeviceIdentity, Fence, Handle, MemoryInfo, side_by_side
from kvcached_core.driver.handle_table import HandleTable
from kvcached_core.errors import CapacityError, DriverError, KVCachedError, UnsupportedError

if TYPE_CHECKING:
    import torch

SUCCESS, OUT_OF_MEMORY, NOT_READY = 0, 2, 600  # the same numbers in the driver and in the runtime


def _checked(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of cuda.bindings or CuPy and return its value.

    No other code looks at a status. Raises CapacityError if memory ran out, else DriverError.
    """
    name = call.__name__
    try:
        result = call(*arguments, **options)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise _typed(name, int(error.status), str(error)) from error
    if not (isinstance(result, tuple) and result and isinstance(result[0], cu.CUresult)):
        return result  # CuPy raises, and returns bare values
    status, *values = result
    if int(status) != SUCCESS:
        raise _typed(name, int(status), getattr(status, "name", str(status)))
    return values[0] if values else None


def _typed(call: str, status: int, text: str) -> KVCachedError:
    if status == OUT_OF_MEMORY:
        return CapacityError(f"{call}: {text}")
    return DriverError(call, status, text)


class CudaDriver:
    """Pages of device memory behind reserved virtual addresses. Callable from any thread.

    Measured on an H100: 13 us to create a page, 40 us to map, 22 us to unmap, whatever its size. A row takes
    as long as its pages one by one, but most of that in one call. Each call releases Python's lock, and the
    supply thread must wait for it again beside the engine's loop. So pages are created, mapped and freed
    without choosing the device first: these calls name the device or need none.
    """

    name = "cuda"
    max_mappings = sys.maxsize  # the device sets no limit; addresses do

    def __init__(self, device_index: int, capacity_bytes: int = 0) -> None:
        """Open a device by its visible index; `capacity_bytes` caps the memory held (0: no cap).

        Raises UnsupportedError if the device cannot be used or has no virtual memory management.
        """
        self._index = device_index
        self._capacity_bytes = capacity_bytes
        self._device = cupy.cuda.Device(device_index)
        self._runtime = cupy.cuda.runtime
        try:
            self._use()
            _checked(self._runtime.free, 0)  # makes the primary context, which the engine shares
        except DriverError as error:
            raise UnsupportedError(f"CUDA device {device_index} cannot be used: {error}") from error
        self._ordinal = _checked(cu.cuDeviceGet, device_index)
        self._require_virtual_memory()
        self._properties, self._access = _page_properties(device_index)
        minimum = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = _checked(cu.cuMemGetAllocationGranularity, self._properties, minimum)
        self.granularity_bytes = int(granularity)
        self._table = HandleTable()
        self._stream = _checked(cupy.cuda.Stream, non_blocking=True)

    def identity(self) -> DeviceIdentity:
        """Return the UUID as nvidia-smi prints it; on a MIG device, the UUID of the instance."""
        # cuda-bindings 13 has only the newer function, under the plain name. CuPy's device properties
        # pass the 16 bytes through a C string, which ends at the first zero byte.
        get_uuid = getattr(cu, "cuDeviceGetUuid_v2", cu.cuDeviceGetUuid)
        raw = bytes(_checked(get_uuid, self._ordinal).bytes)
        text: bytes = _checked(cu.cuDeviceGetName, 256, self._ordinal)
        name = text.split(b"\0")[0].decode("utf-8", "replace")
        is_instance = " MIG " in name or os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
        return DeviceIdentity(f"{'MIG' if is_instance else 'GPU'}-{uuid.UUID(bytes=raw)}", name)

    def memory(self) -> MemoryInfo:
        """Return the device's memory, within the capacity if one was given."""
        self._use()
        free, total = _checked(self._runtime.memGetInfo)
        if not self._capacity_bytes:
            return MemoryInfo(free, total)
        left = self._capacity_bytes - sum(list(self._table.sizes.values()))
        return MemoryInfo(max(0, min(free, left)), min(total, self._capacity_bytes))

    def reserve(self, size_bytes: int) -> int:
        """Reserve device addresses."""
        address = int(_checked(cu.cuMemAddressReserve, size_bytes, 0, 0, 0))
        self._table.ranges[address] = size_bytes
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Return device addresses."""
        self._table.check_unreservable(address, size_bytes)
        _checked(cu.cuMemAddressFree, address, size_bytes)
        del self._table.ranges[address]

    def create(self, size_bytes: int) -> Handle:
        """Create a page on the device."""
        if self._capacity_bytes and self.memory().free_bytes < size_bytes:
            raise CapacityError(
                f"cuda: {size_bytes} bytes more are over the capacity of {self._capacity_bytes}"
            )
        handle = int(_checked(cu.cuMemCreate, size_bytes, self._properties, 0))
        self._table.sizes[handle] = size_bytes
        return handle

    def clean(self, handle: Handle) -> None:
        """Do nothing: a memset on the stream of the step costs less than one here would."""
        self._table.check_releasable(handle)

    def release(self, handle: Handle) -> None:
        """Give a page back to the device."""
        self._table.check_releasable(handle)
        _checked(cu.cuMemRelease, handle)
        self._table.released(handle)

    def map(self, address: int, page_bytes: int, handles: Sequence[Handle], stream: int = 0) -> None:
        """Map pages and set them to zero on `stream`: fresh memory may hold NaN bit patterns."""
        self._use()
        with ExitStack() as undo:
            self._map_pages(address, page_bytes, handles, True, undo)
            # Last: once the memset is queued, only a fence could make an unmap safe.
            _checked(self._runtime.memsetAsync, address, 0, page_bytes * len(handles), stream)
            undo.pop_all()

    def alias(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Map a page at one more address, contents as they are."""
        with ExitStack() as undo:
            self._map_pages(address, size_bytes, [handle], False, undo)
            undo.pop_all()

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Unmap pages at once, in no stream's order."""
        pages = self._table.unmappable(address, page_bytes, count)
        _checked(cu.cuMemUnmap, address, page_bytes * count)
        for page in pages:
            self._table.unmapped(page)

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return an int8 tensor over the range, which must stay reserved while the tensor is used."""
        import torch

        self._use()
        memory = cupy.cuda.UnownedMemory(address, size_bytes, self, self._index)
        array = cupy.ndarray((size_bytes,), dtype=cupy.int8, memptr=cupy.cuda.MemoryPointer(memory, 0))
        return torch.from_dlpack(array)

    def record(self, stream: int) -> Fence:
        """Record an event on a stream."""
        self._use()
        event = _checked(cupy.cuda.Event, block=False, disable_timing=True)
        _checked(self._runtime.eventRecord, event.ptr, stream)
        return event

    def passed(self, fence: Fence) -> bool:
        """Ask the event. Raises DriverError when the device has failed (Event.done would stay false)."""
        self._use()
        status = int(_checked(self._runtime.eventQuery, fence.ptr))
        if status not in (SUCCESS, NOT_READY):
            raise _typed("eventQuery", status, "the device failed before the fence")
        return status == SUCCESS

    def own_stream(self) -> int:
        """Return a stream that waits for no other, the default one included."""
        return int(self._stream.ptr)

    def follow(self, stream: int, fence: Fence) -> None:
        """Queue the wait on the stream."""
        self._use()
        _checked(self._runtime.streamWaitEvent, stream, fence.ptr)

    def synchronize(self) -> None:
        """Wait for the device."""
        self._use()
        _checked(self._runtime.deviceSynchronize)

    def close(self) -> None:
        """Unmap and free all pages; addresses stay reserved. May be called again."""
        for address, page in list(self._table.mappings.items()):
            with suppress(KVCachedError):
                self.unmap(address, page.size_bytes)
        for handle in list(self._table.sizes):
            # A handle whose page would not unmap is released too: the memory goes with the process.
            with suppress(KVCachedError):
                _checked(cu.cuMemRelease, handle)
        self._table = HandleTable(self._table.ranges)

    def _use(self) -> None:
        _checked(self._device.use)  # for the calling thread; a fraction of a microsecond

    def _map_pages(
        self, address: int, page_bytes: int, handles: Sequence[Handle], exclusive: bool, undo: ExitStack
    ) -> None:
        self._table.check_mappable(address, page_bytes, handles, exclusive)
        for page, handle in side_by_side(address, page_bytes, handles):
            _checked(cu.cuMemMap, page, page_bytes, 0, handle, 0)
            self._table.mapped(page, page_bytes, handle)
            undo.callback(self._table.unmapped, page)
            undo.callback(_checked, cu.cuMemUnmap, page, page_bytes)
        _checked(cu.cuMemSetAccess, address, page_bytes * len(handles), [self._access], 1)

    def _require_virtual_memory(self) -> None:
        attribute = cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not _checked(cu.cuDeviceGetAttribute, attribute, self._ordinal):
            raise UnsupportedError(
                f"CUDA device {self._index} ({self.identity().name}) has no virtual memory management: "
                "run the engine without kvcached on it, or use a GPU and a driver that have it"
            )


def _page_properties(device_index: int) -> tuple[Any, Any]:
    """Return the arguments of cuMemCreate and cuMemSetAccess: pinned memory, used on the device."""
    properties = cu.CUmemAllocationProp()
    properties.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    access = cu.CUmemAccessDesc()
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    for location in (properties.location, access.location):
        location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device_index
    return properties, access
