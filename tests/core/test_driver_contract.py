"""The contract of every driver, tested only through its verbs. `--driver NAME` chooses the driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import open_driver
from kvcached_core.errors import CapacityError, InvariantError
from kvcached_core.geometry import make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount

PAGES = 16  # the capacity of each driver
SMALLEST_PAGE_BYTES = 64 << 10


@pytest.fixture
def open_it(request: pytest.FixtureRequest) -> Callable[[int], Driver]:
    """Return a function that opens the chosen driver with a capacity in bytes."""
    name = request.config.getoption("--driver")
    return lambda capacity_bytes: open_driver(name, capacity_bytes=capacity_bytes)


@pytest.fixture
def page(open_it: Callable[[int], Driver]) -> int:
    """Return a page size: a multiple of the driver's granularity."""
    probe = open_it(0)
    granularity = probe.granularity_bytes
    probe.close()
    return -(-SMALLEST_PAGE_BYTES // granularity) * granularity


@pytest.fixture
def driver(open_it: Callable[[int], Driver], page: int) -> Iterator[Driver]:
    """Return the driver with room for 16 pages."""
    driver = open_it(PAGES * page)
    yield driver
    driver.close()


def mapped_page(driver: Driver, page: int) -> tuple[int, int]:
    """Return the address and the handle of a mapped page in a range of four pages."""
    address, handle = driver.reserve(4 * page), driver.create(page)
    driver.map(address, page, [handle])
    return address, handle


def only(driver: Driver, tensor: Any, value: int) -> bool:
    """Say whether all bytes have this value, after all work of the device."""
    driver.synchronize()
    return bool((tensor == value).all())


def fill(driver: Driver, tensor: Any, value: int) -> None:
    """Write a value to all bytes and wait until it is there."""
    tensor.fill_(value)
    driver.synchronize()


def test_a_driver_has_all_verbs_and_says_what_its_device_is(driver: Driver) -> None:
    assert isinstance(driver, Driver)
    assert driver.identity().uuid and driver.identity().name
    assert driver.granularity_bytes > 0 and driver.max_mappings > 0


def test_a_mapped_page_reads_zero_also_after_use(driver: Driver, page: int) -> None:
    address, handle = mapped_page(driver, page)
    tensor = driver.tensor(address, 4 * page)
    assert tensor.shape == (4 * page,) and str(tensor.dtype) == "torch.int8"
    for clean in (False, True, False):
        assert only(driver, tensor[:page], 0)
        fill(driver, tensor[:page], 7)
        driver.unmap(address, page)
        if clean:
            driver.clean(handle)
        driver.map(address, page, [handle])
    assert only(driver, tensor[:page], 0)


def test_a_part_of_a_row_can_be_unmapped(driver: Driver, page: int) -> None:
    address, handles = driver.reserve(4 * page), [driver.create(page) for _ in range(3)]
    driver.map(address, page, handles)
    tensor = driver.tensor(address, 4 * page)
    fill(driver, tensor[: 3 * page], 7)
    driver.unmap(address + page, page, 2)
    driver.map(address + page, page, handles[:0:-1])
    assert only(driver, tensor[:page], 7) and only(driver, tensor[page : 3 * page], 0)


def test_an_alias_shows_the_same_bytes_and_keeps_the_page(driver: Driver, page: int) -> None:
    address, handle = mapped_page(driver, page)
    tensor = driver.tensor(address, 4 * page)
    fill(driver, tensor[:page], 5)
    driver.alias(address + page, page, handle)
    assert only(driver, tensor[page : 2 * page], 5)
    driver.unmap(address, page)
    with pytest.raises(InvariantError):
        driver.release(handle)
    driver.unmap(address + page, page)
    driver.release(handle)


def test_i1_created_pages_count_as_taken_until_they_are_released(driver: Driver, page: int) -> None:
    assert driver.memory().total_bytes <= PAGES * page
    handles = [driver.create(page) for _ in range(PAGES)]
    assert driver.memory().free_bytes == 0
    with pytest.raises(CapacityError):
        driver.create(page)
    for handle in handles:
        driver.release(handle)
    assert driver.memory().free_bytes == PAGES * page


@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda d, a, h, p: d.map(a + p, p, [h]), id="a mapped handle"),
        pytest.param(lambda d, a, h, p: d.map(a, p, [d.create(p)]), id="a taken address"),
        pytest.param(lambda d, a, h, p: d.map(a + 4 * p, p, [d.create(p)]), id="beyond the range"),
        pytest.param(lambda d, a, h, p: d.map(a + 3 * p, p, [d.create(p), d.create(p)]), id="half beyond"),
        pytest.param(lambda d, a, h, p: d.map(a + p, p, [d.create(p)] * 2), id="one handle twice"),
        pytest.param(lambda d, a, h, p: d.map(a + p, p, []), id="no handle"),
        pytest.param(lambda d, a, h, p: d.unmap(a, p, 2), id="the second is not mapped"),
        pytest.param(lambda d, a, h, p: d.unmap(a, 2 * p), id="a page of another size"),
        pytest.param(lambda d, a, h, p: d.release(h), id="release of a mapped page"),
        pytest.param(lambda d, a, h, p: d.clean(h), id="clean of a mapped page"),
        pytest.param(lambda d, a, h, p: d.unreserve(a, 4 * p), id="unreserve of mapped pages"),
    ],
)
def test_misuse_is_an_invariant_error_and_changes_nothing(
    driver: Driver, page: int, misuse: Callable[[Driver, int, int, int], Any]
) -> None:
    address, handle = mapped_page(driver, page)
    tensor = driver.tensor(address, 4 * page)
    fill(driver, tensor[:page], 3)
    with pytest.raises(InvariantError):
        misuse(driver, address, handle, page)
    assert only(driver, tensor[:page], 3)
    driver.map(address + page, page, [driver.create(page), driver.create(page), driver.create(page)])
    driver.unmap(address, page, 4)
    driver.release(handle)


def test_i6_a_fence_passes_after_the_work_before_it(driver: Driver, page: int) -> None:
    address, handle = driver.reserve(page), driver.create(page)
    stream = driver.own_stream()
    driver.map(address, page, [handle], stream)
    fence = driver.record(stream)
    driver.follow(0, fence)
    assert only(driver, driver.tensor(address, page), 0)
    assert driver.passed(fence) and driver.passed(driver.record(0))


def test_i11_close_frees_everything_and_may_be_called_again(
    open_it: Callable[[int], Driver], page: int
) -> None:
    driver = open_it(PAGES * page)
    address, _ = mapped_page(driver, page)
    driver.create(page)
    driver.close()
    driver.close()
    driver.unreserve(address, 4 * page)


def test_two_threads_create_and_release_together(driver: Driver, page: int) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                for handle in [driver.create(page) for _ in range(4)]:
                    driver.release(handle)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert driver.memory().free_bytes == PAGES * page


def test_a_pool_runs_on_the_driver(open_it: Callable[[int], Driver], page: int) -> None:
    driver, account = open_it(PAGES * page), FakeAccount(page, PAGES * page)
    geometry = make_geometry(page, page, (0,), 8, driver.granularity_bytes)
    pool = ElasticPool(driver, geometry, account)
    account.want(6)
    pool.supply_thread.turn(0.0)
    for step in (0, 2, 4):
        pool.apply(Plan(step, (), (1, 2, 5), 0))
        for granule in (1, 2, 5):
            used = pool.tensor[granule * page : (granule + 1) * page]
            assert only(driver, used, 0)
            fill(driver, used, 7)
        pool.apply(Plan(step + 1, (1, 2, 5), (), 0))
        pool.supply_thread.turn(float(step))
        pool.check()
    pool.close()
    account.close()
