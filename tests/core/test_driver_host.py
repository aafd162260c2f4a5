"""The host driver, on real memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devkit.report import record
from kvcached_core.driver.base import Driver, MemoryInfo
from kvcached_core.driver.host import HostDriver, SystemCalls
from kvcached_core.errors import CapacityError, DriverError, InvariantError

PAGE = 16 * mmap.PAGESIZE


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    """Return a driver with room for 64 pages."""
    driver = HostDriver(64 * PAGE)
    yield driver
    driver.close()


def backed_bytes(driver: HostDriver) -> int:
    """Return the bytes of memory that back the driver's file."""
    return os.fstat(driver._fd).st_blocks * 512


def mapped_page(driver: HostDriver) -> tuple[int, int]:
    """Return (address, handle) of a mapped page in a range of four."""
    address, handle = driver.reserve(4 * PAGE), driver.create(PAGE)
    driver.map(address, PAGE, [handle])
    return address, handle


def test_it_is_a_driver_and_says_which_device(driver: HostDriver) -> None:
    assert isinstance(driver, Driver)
    assert driver.identity().uuid == "host" and driver.identity().name
    assert driver.granularity_bytes == mmap.PAGESIZE
    assert 0 < driver.max_mappings < int(Path("/proc/sys/vm/max_map_count").read_text())


def test_a_mapped_page_reads_zero_also_after_use(driver: HostDriver) -> None:
    address, handle = mapped_page(driver)
    tensor = driver.tensor(address, 4 * PAGE)
    for clean in (False, True, False):
        page = tensor[:PAGE]
        assert int(page.count_nonzero()) == 0
        page.fill_(7)
        driver.unmap(address, PAGE)
        if clean:
            driver.clean(handle)
            assert os.pread(driver._fd, PAGE, driver._offsets[handle]) == bytes(PAGE)
        driver.map(address, PAGE, [handle])
    assert tensor.shape == (4 * PAGE,) and str(tensor.dtype) == "torch.int8"


def test_an_offset_that_is_used_again_reads_zero(driver: HostDriver) -> None:
    address, handle = mapped_page(driver)
    offset = driver._offsets[handle]
    ctypes.memset(address, 9, PAGE)
    driver.unmap(address, PAGE)
    driver.release(handle)
    again = driver.create(PAGE)
    assert (driver._offsets[again], again != handle) == (offset, True)
    driver.map(address, PAGE, [again])
    assert ctypes.string_at(address, PAGE) == bytes(PAGE)


def test_an_alias_shows_the_same_bytes(driver: HostDriver) -> None:
    address, handle = mapped_page(driver)
    ctypes.memset(address, 5, PAGE)
    driver.alias(address + PAGE, PAGE, handle)
    assert ctypes.string_at(address + PAGE, PAGE) == b"\5" * PAGE
    driver.unmap(address, PAGE)
    with pytest.raises(InvariantError):
        driver.release(handle)
    driver.unmap(address + PAGE, PAGE)
    driver.release(handle)


def test_create_backs_the_page_and_release_gives_its_bytes_back(driver: HostDriver) -> None:
    handles = [driver.create(PAGE) for _ in range(8)]
    assert backed_bytes(driver) == 8 * PAGE, "before any touch"
    assert driver.memory().free_bytes <= 56 * PAGE
    for handle in handles:
        driver.clean(handle)
        driver.release(handle)
    assert backed_bytes(driver) == 0
    assert driver.memory() == MemoryInfo(64 * PAGE, 64 * PAGE)


def test_capacity_is_a_limit_with_numbers(driver: HostDriver) -> None:
    for _ in range(64):
        driver.create(PAGE)
    with pytest.raises(CapacityError, match=f"{PAGE} bytes were asked for, 0 bytes are free"):
        driver.create(PAGE)
    assert backed_bytes(driver) == 64 * PAGE


@pytest.mark.parametrize(
    "misuse",
    [
        lambda d, a, h: d.map(a + PAGE, PAGE, [h]),  # mapped already
        lambda d, a, h: d.map(a, PAGE, [d.create(PAGE)]),  # address taken
        lambda d, a, h: d.map(a + PAGE, 2 * PAGE, [h]),  # size
        lambda d, a, h: d.map(a + 4 * PAGE, PAGE, [d.create(PAGE)]),  # outside
        lambda d, a, h: d.map(a + PAGE, PAGE, []),
        lambda d, a, h: d.map(a + PAGE, PAGE, [d.create(PAGE)] * 2),  # one handle twice
        lambda d, a, h: d.map(a + 3 * PAGE, PAGE, [d.create(PAGE), d.create(PAGE)]),  # the second is outside
        lambda d, a, h: d.unmap(a, PAGE, 2),  # the second is not mapped
        lambda d, a, h: d.unmap(a + PAGE, PAGE),
        lambda d, a, h: d.unmap(a, 2 * PAGE),
        lambda d, a, h: d.release(h),
        lambda d, a, h: d.release(h + 99),
        lambda d, a, h: d.clean(h),
        lambda d, a, h: d.unreserve(a, 4 * PAGE),
        lambda d, a, h: d.unreserve(a, PAGE),
    ],
)
def test_misuse_is_an_invariant_error_and_changes_nothing(
    driver: HostDriver, misuse: Callable[[HostDriver, int, int], Any]
) -> None:
    address, handle = mapped_page(driver)
    mappings = dict(driver._table.mappings)
    with pytest.raises(InvariantError):
        misuse(driver, address, handle)
    assert driver._table.mappings == mappings
    ctypes.memset(address, 1, PAGE)


def test_close_frees_all_and_may_be_called_again() -> None:
    driver = HostDriver(64 * PAGE)
    address, _ = mapped_page(driver)
    driver.create(PAGE)
    watch = os.dup(driver._fd)
    driver.close()
    driver.close()
    assert os.fstat(watch).st_blocks == 0
    os.close(watch)
    driver.unreserve(address, 4 * PAGE)


class FailingCalls(SystemCalls):
    """Fails the n-th call of one kind from now on (counting only while armed), once or for good."""

    def __init__(self) -> None:
        super().__init__()
        self.call, self.left, self.forever, self.code, self.injected = "", 0, False, errno.ENOMEM, 0

    def arm(self, call: str, nth: int, code: int, forever: bool) -> None:
        """Let the nth call fail."""
        self.call, self.left, self.code, self.forever = call, nth, code, forever

    def _maybe_fail(self, call: str) -> None:
        if call != self.call:
            return
        self.left -= 1
        if self.left == 0 or (self.forever and self.left < 0):
            self.injected += 1
            raise OSError(self.code, os.strerror(self.code), call)

    def mmap(self, address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        self._maybe_fail("mmap")
        return super().mmap(address, size, protection, flags, fd, offset)

    def munmap(self, address: int, size: int) -> None:
        self._maybe_fail("munmap")
        super().munmap(address, size)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        self._maybe_fail("fallocate")
        super().fallocate(fd, mode, offset, size)


STEPS: dict[str, tuple[str, Callable[[HostDriver, int, int, int], Any]]] = {
    "reserve": ("mmap", lambda d, a, mapped, spare: d.reserve(PAGE)),
    "unreserve": ("munmap", lambda d, a, mapped, spare: d.unreserve(a + 0, 4 * PAGE)),
    "create": ("fallocate", lambda d, a, mapped, spare: d.create(PAGE)),
    "release": ("fallocate", lambda d, a, mapped, spare: d.release(spare)),
    "map": ("mmap", lambda d, a, mapped, spare: d.map(a + PAGE, PAGE, [spare])),
    "alias": ("mmap", lambda d, a, mapped, spare: d.alias(a + PAGE, PAGE, mapped)),
    "unmap": ("mmap", lambda d, a, mapped, spare: d.unmap(a, PAGE)),
}


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOMEM, CapacityError), (errno.ENOSPC, CapacityError), (errno.EIO, DriverError)],
)
@pytest.mark.parametrize("verb", STEPS)
def test_i8_a_verb_whose_system_call_fails_leaves_the_state_as_it_was(
    verb: str, code: int, error: type[Exception], forever: bool
) -> None:
    system = FailingCalls()
    driver = HostDriver(64 * PAGE, system=system)
    address, mapped = mapped_page(driver)
    spare = driver.create(PAGE)
    if verb == "unreserve":
        driver.unmap(address, PAGE)

    def state() -> tuple[Any, ...]:
        table = driver._table
        return (
            dict(table.sizes),
            dict(table.mappings),
            dict(table.ranges),
            backed_bytes(driver),
            driver._held_bytes,
        )

    before = state()
    call, step = STEPS[verb]
    for _ in range(2 if forever else 1):
        system.arm(call, 1, code, forever)
        with pytest.raises(error):
            step(driver, address, mapped, spare)
        assert state() == before
    system.arm("", 0, 0, False)
    step(driver, address, mapped, spare)
    assert state() != before
    driver.close()
    record("driver.injected_failures", system.injected)


def test_i8_a_row_that_fails_half_way_is_undone() -> None:
    system = FailingCalls()
    driver = HostDriver(64 * PAGE, system=system)
    address, handles = driver.reserve(4 * PAGE), [driver.create(PAGE) for _ in range(3)]
    for nth in (1, 2, 3):
        system.arm("mmap", nth, errno.ENOMEM, False)
        with pytest.raises(CapacityError):
            driver.map(address, PAGE, handles)
        assert not driver._table.mappings
    driver.map(address, PAGE, handles)
    ctypes.memset(address, 7, 3 * PAGE)
    driver.unmap(address + PAGE, PAGE, 2)
    driver.map(address + PAGE, PAGE, handles[1:])
    assert ctypes.string_at(address, 3 * PAGE) == b"\7" * PAGE + bytes(2 * PAGE)
    driver.close()
    record("driver.injected_failures", system.injected)


def test_two_threads_create_and_release_together(driver: HostDriver) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                handles = [driver.create(PAGE) for _ in range(4)]
                assert len({driver._offsets[handle] for handle in handles}) == 4
                for handle in handles:
                    driver.release(handle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert (backed_bytes(driver), driver._held_bytes) == (0, 0)
