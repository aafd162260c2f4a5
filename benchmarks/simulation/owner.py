"""One owner of memory: a scheduler and a worker, which are two processes on the simulated clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.simulation.clockwork import Process, World
from benchmarks.simulation.device import Device, SimulatedDriver
from benchmarks.simulation.scheduler import Block, Cache, Queue, Request
from benchmarks.simulation.traffic import Arrival
from kvcached_core.geometry import Geometry
from kvcached_core.ledger import Account, Runtime, SchedulerView
from kvcached_core.scheduler.governor import Governor
from kvcached_core.scheduler.granules import Granules
from kvcached_core.worker.pool import ElasticPool

GRANULE_BYTES, BLOCKS_PER_GRANULE = 16 << 20, 8  # Llama-8B: a granule is a page of 8 blocks of 2 MiB
STEP_SECONDS = 0.025
EMPTY_STEP_SECONDS = 0.001
GRANT_SECONDS, PAUSE_SECONDS = 0.02, 0.0005  # how long a step waits for memory; pause between two looks
SPARE_GRANULES, IDLE_SECONDS = 4, 2.0


class Terms(NamedTuple):
    """Weight, floor and limit of an owner. Floor and limit are in bytes; None: no limit below the device."""

    weight: int = 100
    floor_bytes: int = 0
    limit_bytes: int | None = None


class Owner:
    """A simulated engine that serves requests on a shared device."""

    def __init__(self, world: World, runtime: Runtime, device: Device, number: int, terms: Terms,
                 requests: Sequence[Arrival]) -> None:  # fmt: skip
        driver, instance, size = SimulatedDriver(device), f"owner-{number}", device.capacity_bytes
        count = size // GRANULE_BYTES
        self.account = Account.attach(
            runtime, driver.identity(), size, 0, instance=instance, rank=0, name=instance, clock=world.clock,
            limit_bytes=terms.limit_bytes, floor_bytes=terms.floor_bytes, weight=terms.weight,
        )  # fmt: skip
        blocks = count * BLOCKS_PER_GRANULE
        geometry = Geometry(
            GRANULE_BYTES, GRANULE_BYTES // BLOCKS_PER_GRANULE, (0,), blocks, BLOCKS_PER_GRANULE, count
        )
        self.account.describe(
            page_bytes=GRANULE_BYTES, granule_bytes=GRANULE_BYTES, granule_count=count,
            blocks_per_granule=BLOCKS_PER_GRANULE, block_count=blocks, stride_bytes=geometry.stride_bytes,
        )  # fmt: skip
        self.driver = driver
        self.pool = ElasticPool(driver, geometry, self.account, clock=world.clock)
        self._view = SchedulerView.find(runtime, instance, 1, world.clock)
        self.granules: Granules[Block] = Granules(
            [Block(number) for number in range(blocks)], range(0, blocks, BLOCKS_PER_GRANULE),
            BLOCKS_PER_GRANULE,
        )  # fmt: skip
        self.cache = Cache(self.granules)
        self.governor = Governor(self.granules, self._view, self.cache.evict, SPARE_GRANULES, IDLE_SECONDS)
        self.queue = Queue(self.cache)
        self._world, self._begin = world, world.now
        self._to_come = deque(requests)
        self._idle_since_ms = 1
        self.preempted_for_floors = 0
        self.worker = driver.worker = world.spawn(self._work, [self.account.fileno()])
        self.scheduler = world.spawn(self._serve, self._view.filenos())

    def close(self) -> None:
        """Leave the ledger, after the world has stopped."""
        self.driver.worker = None
        self._view.close()
        self.pool.close()
        self.account.detach()

    def demand_granules(self) -> int:
        """Return the true demand: the granules that all running and waiting requests need."""
        of_blocks = -(-self.queue.true_demand_blocks() // BLOCKS_PER_GRANULE)
        return max(self.granules.busy, of_blocks)

    def check(self) -> None:
        """Check the owner's granules, pool and account. Raises InvariantError."""
        self.governor.check()
        self.pool.check()
        self.account.check()

    # -- the worker's supply thread ----------------------------------------------------------------------

    def _work(self, process: Process) -> None:
        rung = True
        while True:
            wait = self.pool.supply_thread.turn(self._world.now, rung)
            process.sleep(self.driver.debt_seconds())
            rung = process.sleep(wait, hears=True)

    # -- the engine's loop -------------------------------------------------------------------------------

    def _serve(self, process: Process) -> None:
        while True:
            self._view.drain()
            self._receive()
            if self.queue.waiting or self.queue.running:
                self._idle_since_ms = 0
                self._step(process)
            else:
                self._rest(process)

    def _receive(self) -> None:
        while self._to_come and self._begin + self._to_come[0].at <= self._world.now:
            self.queue.waiting.append(Request(self._to_come.popleft()))

    def _rest(self, process: Process) -> None:
        """Give back reclaimed memory, then sleep until a doorbell, the governor's deadline or a request."""
        self._idle_since_ms = self._idle_since_ms or int(self._world.now * 1000)
        self.governor.update(self._world.now, 0, busy=False)
        if self.governor.plan_gives_back:
            self._send_plan(process)
            process.sleep(EMPTY_STEP_SECONDS)
            return
        self._count()
        times = [self._begin + self._to_come[0].at] if self._to_come else []
        if self.governor.deadline is not None:
            times.append(self.governor.deadline)
        process.sleep(max(PAUSE_SECONDS, min(times) - self._world.now) if times else None, hears=True)

    def _step(self, process: Process) -> None:
        queue, governor = self.queue, self.governor
        governor.update(self._world.now, queue.demand_blocks(), busy=True)
        preempted = self._preempt_for_a_floor()
        if not preempted:
            self._wait_for_memory(process)
        running = queue.schedule(not (preempted or (governor.over_target and queue.running)))
        self._send_plan(process)
        process.sleep(STEP_SECONDS if running else EMPTY_STEP_SECONDS)
        queue.advance()

    def _preempt_for_a_floor(self) -> int:
        """Preempt requests until other owners have their floors, as the plugin for vLLM does."""
        preempted = 0
        while self.queue.running and self.governor.must_preempt_to(self._world.now) is not None:
            self.queue.preempt()
            preempted += 1
        self.preempted_for_floors += preempted
        if preempted:
            self.governor.update(self._world.now, self.queue.demand_blocks(), busy=True)
        return preempted

    def _wait_for_memory(self, process: Process) -> None:
        give_up_at = self._world.now + GRANT_SECONDS
        while self.governor.waiting and self.queue.is_short() and self._world.now < give_up_at:
            process.sleep(PAUSE_SECONDS)
            self.governor.refresh()

    def _send_plan(self, process: Process) -> None:
        self._count()
        self.pool.apply(self.governor.take_plan())
        self.worker.wake()
        process.sleep(self.driver.debt_seconds())

    def _count(self) -> None:
        busy = not self._idle_since_ms
        self._view.count(self.cache.evictions, self.queue.preemptions, busy, self._idle_since_ms)
