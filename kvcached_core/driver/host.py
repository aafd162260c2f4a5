"""Host memory: pages of one memfd, mapped over a range in which every other access faults."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from kvcached_core.driver.base import DeviceIdentity, Fence, Handle, MemoryInfo, side_by_side
from kvcached_core.driver.handle_table import HandleTable
from kvcached_core.driver.machine import Machine
from kvcached_core.errors import CapacityError, DriverError

if TYPE_CHECKING:
    import torch

PROT_NONE, PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
NO_ROOM = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EAGAIN})
_ZEROS = memoryview(bytes(1 << 20))


class SystemCalls:
    """Calls of the C library that Python lacks; each raises OSError. Tests replace them."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap, self._fallocate = libc.mmap, libc.munmap, libc.fallocate
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

    def mmap(self, address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        """Map and return the address."""
        result = self._mmap(address, size, protection, flags, fd, offset)
        if result in (None, ctypes.c_void_p(-1).value):
            _raise_errno("mmap")
        return int(result)

    def munmap(self, address: int, size: int) -> None:
        """Remove a range from the address space."""
        if self._munmap(address, size):
            _raise_errno("munmap")

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """Back a part of a file with memory, or punch a hole. Continues after a signal."""
        while self._fallocate(fd, mode, offset, size):
            if ctypes.get_errno() != errno.EINTR:
                _raise_errno("fallocate")


def _raise_errno(call: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), call)


def _typed(error: OSError) -> CapacityError | DriverError:
    """Return CapacityError if the system had no room, else DriverError."""
    call, text = str(error.filename or "system call"), str(error.strerror)
    if error.errno in NO_ROOM:
        return CapacityError(f"{call}: {text}")
    return DriverError(call, error.errno or 0, text)


class HostDriver:
    """Pages of host memory; an access to an unmapped page faults.

    A page is a range of one memfd. It is backed in full when create() returns, so a later touch cannot run
    out of memory. A forked child shares the memfd and its pages until it exits or executes another program
    (the descriptor is closed on exec): fork before the driver is opened, not after.
    """

    name = "host"
    granularity_bytes = mmap.PAGESIZE

    def __init__(
        self, capacity_bytes: int = 0, machine: Machine | None = None, system: SystemCalls | None = None
    ) -> None:
        """Open with room for `capacity_bytes` of pages; 0 means all memory of the machine."""
        self._machine = machine or Machine()
        self._system = system or SystemCalls()
        self._capacity_bytes = capacity_bytes or self._machine.memory().total_bytes
        self.max_mappings = self._machine.max_mappings()
        self._fd = os.memfd_create("kvcached", os.MFD_CLOEXEC)
        self._table = HandleTable()
        self._offsets: dict[Handle, int] = {}
        self._dirty: set[Handle] = set()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards the three attributes below; never held during a system call
        self._held_bytes = 0
        self._end = 0  # the file was used in [0, end)
        self._holes: defaultdict[int, list[int]] = defaultdict(list)  # size -> free offsets, without memory

    def identity(self) -> DeviceIdentity:
        """Return `host`, the ledger of host memory."""
        return DeviceIdentity("host", self._machine.name())

    def memory(self) -> MemoryInfo:
        """Return the least free and total memory of the machine, its control groups and the capacity."""
        free, total = self._machine.memory()
        left = self._capacity_bytes - self._held_bytes
        return MemoryInfo(max(0, min(free, left)), min(total, self._capacity_bytes))

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses; they take no memory, and an access faults."""
        try:
            address = self._system.mmap(None, size_bytes, PROT_NONE, NOTHING, -1, 0)
        except OSError as error:
            raise _typed(error) from error
        self._table.ranges[address] = size_bytes
        return address

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Give addresses back to the process."""
        self._table.check_unreservable(address, size_bytes)
        try:
            self._system.munmap(address, size_bytes)
        except OSError as error:
            raise _typed(error) from error
        del self._table.ranges[address]

    def create(self, size_bytes: int) -> Handle:
        """Back a page of the memfd with zeroed memory."""
        free_bytes = self.memory().free_bytes
        if free_bytes < size_bytes:
            raise CapacityError(f"host: {size_bytes} bytes were asked for, {free_bytes} bytes are free")
        with self._lock:
            holes = self._holes[size_bytes]
            offset = holes.pop() if holes else self._end
            self._end = max(self._end, offset + size_bytes)
            self._held_bytes += size_bytes
        try:
            self._system.fallocate(self._fd, 0, offset, size_bytes)
        except OSError as error:
            self._free_offset(offset, size_bytes)
            raise _typed(error) from error
        handle = next(self._numbers)
        self._offsets[handle] = offset
        self._table.sizes[handle] = size_bytes
        return handle

    def clean(self, handle: Handle) -> None:
        """Write zeros through the file. Its memory stays, so this cannot run out of room."""
        size_bytes = self._table.check_releasable(handle)
        if handle not in self._dirty:
            return
        offset, end = self._offsets[handle], self._offsets[handle] + size_bytes
        try:
            while offset < end:
                offset += os.pwrite(self._fd, _ZEROS[: end - offset], offset)
        except OSError as error:
            raise _typed(error) from error
        self._dirty.discard(handle)

    def release(self, handle: Handle) -> None:
        """Punch a hole into the memfd: the page's memory goes back to the system."""
        size_bytes = self._table.check_releasable(handle)
        offset = self._offsets[handle]
        try:
            self._system.fallocate(self._fd, PUNCH_HOLE, offset, size_bytes)
        except OSError as error:
            raise _typed(error) from error
        self._table.released(handle)
        del self._offsets[handle]
        self._dirty.discard(handle)
        self._free_offset(offset, size_bytes)

    def map(self, address: int, page_bytes: int, handles: Sequence[Handle], stream: int = 0) -> None:
        """Map pages that are mapped nowhere else, and zero the used ones."""
        self._table.check_mappable(address, page_bytes, handles, exclusive=True)
        with ExitStack() as undo:
            for page, handle in side_by_side(address, page_bytes, handles):
                self._map_page(page, page_bytes, handle)
                undo.callback(self.unmap, page, page_bytes)
            undo.pop_all()
        for page, handle in side_by_side(address, page_bytes, handles):
            if handle in self._dirty:
                ctypes.memset(page, 0, page_bytes)
            self._dirty.add(handle)

    def alias(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Map a page at one more address, contents as they are."""
        self._table.check_mappable(address, size_bytes, [handle], exclusive=False)
        self._map_page(address, size_bytes, handle)
        self._dirty.add(handle)

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Make the pages' addresses fault again."""
        pages = self._table.unmappable(address, page_bytes, count)
        try:
            self._system.mmap(address, page_bytes * count, PROT_NONE, NOTHING | MAP_FIXED, -1, 0)
        except OSError as error:
            raise _typed(error) from error
        for page in pages:
            self._table.unmapped(page)

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return an int8 tensor over the range, which must stay reserved while the tensor is used."""
        import torch

        return torch.frombuffer((ctypes.c_int8 * size_bytes).from_address(address), dtype=torch.int8)

    def record(self, stream: int) -> Fence:
        """Return a fence that has passed: the CPU has finished a step when the step returns."""
        return None

    def passed(self, fence: Fence) -> bool:
        """Return True."""
        return True

    def own_stream(self) -> int:
        """Return 0: the host has no streams."""
        return 0

    def follow(self, stream: int, fence: Fence) -> None:
        """Do nothing: every fence has passed."""

    def synchronize(self) -> None:
        """Do nothing: the CPU has finished all earlier work."""

    def close(self) -> None:
        """Unmap and free all pages; addresses stay reserved and inaccessible. May be called again."""
        if self._fd < 0:
            return
        for address, page in list(self._table.mappings.items()):
            with suppress(CapacityError, DriverError):
                self.unmap(address, page.size_bytes)
        # Not release(): a page that could not be unmapped is freed too, and reads zero from now on.
        with suppress(OSError):
            self._system.fallocate(self._fd, PUNCH_HOLE, 0, max(self._end, 1))
        os.close(self._fd)
        self._fd, self._held_bytes = -1, 0
        self._table, self._offsets, self._dirty = HandleTable(self._table.ranges), {}, set()

    def _map_page(self, address: int, size_bytes: int, handle: Handle) -> None:
        flags = mmap.MAP_SHARED | MAP_FIXED
        try:
            self._system.mmap(address, size_bytes, PROT_READ_WRITE, flags, self._fd, self._offsets[handle])
        except OSError as error:
            raise _typed(error) from error
        self._table.mapped(address, size_bytes, handle)

    def _free_offset(self, offset: int, size_bytes: int) -> None:
        with self._lock:
            self._held_bytes -= size_bytes
            self._holes[size_bytes].append(offset)
