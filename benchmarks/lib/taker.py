"""An owner in the ledger without an engine: a pool that takes memory from other owners and gives it back."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from devkit.polling import until
from kvcached_core.driver.base import Driver
from kvcached_core.geometry import Geometry
from kvcached_core.ledger import Account, EngineUsage, Runtime, SchedulerView
from kvcached_core.plan import Plan
from kvcached_core.worker.pool import ElasticPool

NAME = "taker"
POLL_SECONDS = 0.001


class Taker:
    """A pool of `granules` granules of one page each, plus one granule that it never gives back."""

    def __init__(
        self, runtime: Runtime, driver: Driver, headroom_bytes: int, page_bytes: int, per_granule: int,
        granules: int,
    ) -> None:  # fmt: skip
        """Enter the ledger and take the first granule; each granule has `per_granule` blocks.

        Raises CapacityError if there is no room.
        """
        self.granules = granules
        self.page_bytes = page_bytes
        instance, count = f"{NAME}-{os.getpid()}", granules + 1
        self.account = Account.attach(
            runtime, driver.identity(), driver.memory().total_bytes, headroom_bytes,
            instance=instance, rank=0, name=NAME, engine="none",
        )  # fmt: skip
        stride = page_bytes // per_granule
        self.account.describe(
            page_bytes=page_bytes, granule_bytes=page_bytes, granule_count=count,
            blocks_per_granule=per_granule, block_count=count * per_granule, stride_bytes=stride,
        )  # fmt: skip
        geometry = Geometry(page_bytes, stride, (0,), count * per_granule, per_granule, count)
        self._pool = ElasticPool(driver, geometry, self.account)
        self._view = SchedulerView.find(runtime, instance, 1)
        self._released = self._sequence = 0
        self._mapped: tuple[int, ...] = ()
        self._publish(1)
        self._pool.start()

    @property
    def held(self) -> int:
        """Granules that the taker can use."""
        return self._view.created() - self._released

    def wish(self) -> float:
        """Ask for all granules; return the time of the request, in seconds of the monotonic clock."""
        said_at = time.monotonic()
        self._publish(1 + self.granules)
        return said_at

    def wait_for_all(self, seconds: float) -> None:
        """Wait until all granules are there. Raises TimeoutError."""
        self.wait_for(self.granules, seconds)

    def wait_for(self, granules: int, seconds: float) -> None:
        """Wait until `granules` granules are there. Raises TimeoutError."""
        until(
            lambda: self.held > granules,
            seconds,
            lambda: f"{self.held - 1} of {granules} came",
            POLL_SECONDS,
        )

    def map(self, granules: int) -> None:
        """Map `granules` granules with a plan, as a scheduler step does; give_back() unmaps them."""
        self._mapped = tuple(range(1, 1 + granules))
        self._apply((), self._mapped)

    def give_back(self, seconds: float) -> None:
        """Withdraw the request, and release all granules but the first. Raises TimeoutError."""
        self._publish(1)
        self._view.drain()
        until(self._is_at_rest, seconds, lambda: f"{self.account.ready_bytes} bytes are held", POLL_SECONDS)
        self._pool.check()

    def _is_at_rest(self) -> bool:
        """Release all granules, also those that arrive late; return whether all memory is free."""
        if self.held > 1:
            self._released += self.held - 1
            self._publish(1)
            self._apply(self._mapped, ())
            self._mapped = ()
        return self.account.leased_bytes <= self.page_bytes

    def close(self) -> None:
        """Give all memory back, close the driver, and leave the ledger."""
        self._view.close()
        self._pool.close()
        self.account.detach()

    def _apply(self, unmap: tuple[int, ...], mapped: tuple[int, ...]) -> None:
        self._pool.apply(Plan(self._sequence, unmap, mapped, self._released))
        self._sequence += 1

    def _publish(self, granules: int) -> None:
        blocks = (granules - 1) * self._view.geometry[0].blocks_per_granule
        self._view.publish(
            EngineUsage(
                used_blocks=blocks, cached_blocks=0, stranded_blocks=0, mapped_granules=granules,
                wanted_granules=granules, needed_granules=granules, released_granules=self._released,
                enough_granules=granules,
            )
        )  # fmt: skip
        is_busy = granules > 1
        idle_since_ms = 0 if is_busy else int(time.monotonic() * 1000)
        self._view.count(evictions=0, preemptions=0, busy=is_busy, idle_since_ms=idle_since_ms)


def edit_seconds(driver: Driver, page_bytes: int, count: int) -> dict[str, list[float]]:
    """Return the seconds of driver calls, one sample for each page: create, map, and unmap with release."""
    samples: dict[str, list[float]] = {"create": [], "map": [], "unmap_release": []}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        samples[name].append(time.perf_counter() - begun)

    base = driver.reserve(count * page_bytes)
    pages, handles = range(base, base + count * page_bytes, page_bytes), []
    for _ in pages:
        with timed("create"):
            handles.append(driver.create(page_bytes))
    for address, handle in zip(pages, handles, strict=True):
        with timed("map"):
            driver.map(address, page_bytes, [handle])
    driver.synchronize()
    for address, handle in zip(pages, handles, strict=True):
        with timed("unmap_release"):
            driver.unmap(address, page_bytes)
            driver.release(handle)
    driver.unreserve(base, count * page_bytes)
    return {f"driver_{name}_seconds": values for name, values in samples.items()}
