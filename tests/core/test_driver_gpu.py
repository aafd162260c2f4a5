"""The CUDA driver on a real GPU; skipped where there is none."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvcached_core.driver.registry import open_driver
from kvcached_core.errors import CapacityError, UnsupportedError
from kvcached_core.geometry import make_geometry
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool
from tests.fake_account import FakeAccount

needs_gpu = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None or importlib.util.find_spec("cuda") is None,
    reason="CuPy and cuda-bindings are not installed",
)


@pytest.fixture
def real() -> Iterator[Any]:
    """Return the driver on the first GPU."""
    try:
        driver = open_driver("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))
    yield driver
    driver.close()


@needs_gpu
def test_gpu_a_mapped_page_reads_zero_and_holds_what_is_written(real: Any) -> None:
    page, handle_count = real.granularity_bytes, 2
    address = real.reserve(4 * page)
    handles = [real.create(page) for _ in range(handle_count)]
    real.map(address, page, handles[:1])
    tensor = real.tensor(address, 4 * page)
    assert tensor.is_cuda and tensor.data_ptr() == address and tensor.shape == (4 * page,)
    for handle in (handles[1], handles[1]):
        real.map(address + page, page, [handle])
        view = tensor[page : 2 * page]
        assert int(view.count_nonzero()) == 0
        view.fill_(3)
        assert int(view.sum(dtype=view.long().dtype)) == 3 * page
        real.synchronize()
        real.unmap(address + page, page)


@needs_gpu
def test_gpu_rows_of_pages_are_mapped_and_unmapped_in_parts(real: Any) -> None:
    page = 8 * real.granularity_bytes
    address, handles = real.reserve(8 * page), [real.create(page) for _ in range(8)]
    real.map(address, page, handles)
    tensor = real.tensor(address, 8 * page)
    assert int(tensor.count_nonzero()) == 0
    tensor.fill_(3)
    real.synchronize()
    real.unmap(address + 2 * page, page, 4)
    real.map(address + 3 * page, page, handles[3:5])
    assert int(tensor[3 * page : 5 * page].count_nonzero()) == 0
    assert int(tensor[: 2 * page].min()) == int(tensor[6 * page :].min()) == 3
    real.synchronize()
    real.unmap(address, page, 2)
    real.unmap(address + 3 * page, page, 2)
    real.unmap(address + 6 * page, page, 2)
    for handle in handles:
        real.release(handle)


@needs_gpu
def test_gpu_bytes_return_to_the_device(real: Any) -> None:
    size = 64 * real.granularity_bytes
    before = real.memory().free_bytes
    handle = real.create(size)
    assert before - real.memory().free_bytes >= size
    real.release(handle)
    assert real.memory().free_bytes >= before
    with pytest.raises(CapacityError):
        real.create(real.memory().total_bytes * 2 // size * size)


@needs_gpu
def test_gpu_identity_is_what_nvidia_smi_prints(real: Any) -> None:
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    assert real.identity().uuid in listing


@needs_gpu
def test_gpu_i6_granules_come_and_go_under_running_kernels(real: Any) -> None:
    page, count = 8 * real.granularity_bytes, 32
    geometry = make_geometry(page, page // 8, (0,), 8 * count, real.granularity_bytes)
    account = FakeAccount(page, count * page)
    pool = ElasticPool(real, geometry, account)
    pool.begin_warm_up()
    pool.tensor.view(-1, page).fill_(1)  # warm-up may touch any byte: all of them are backed by one page
    assert int(pool.tensor[-1]) == 1
    pool.end_warm_up()
    account.want(8)
    pool.supply_thread.turn(0.0)
    stream = torch.cuda.current_stream().cuda_stream
    live: list[int] = []
    for step in range(200):
        old, live = tuple(live[:3]), live[3:]
        new = tuple(g for g in range(1 + step % 5, count, 5) if g not in live and g not in old)[
            : 7 - len(live)
        ]
        pool.apply(Plan(step, old, new, 0), stream)
        live += new
        for granule in new:
            view = pool.tensor[granule * page : (granule + 1) * page]
            view.add_(1)
        pool.supply_thread.turn(float(step))
        pool.check()
    torch.cuda.synchronize()
    for granule in live:
        assert int(pool.tensor[granule * page : (granule + 1) * page].max()) >= 1
    pool.close()
    assert (account.leased_bytes, account.ready_bytes) == (0, 0)
    account.close()
