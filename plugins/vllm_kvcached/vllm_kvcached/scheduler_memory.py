"""The scheduler's side of an engine's memory: its budget, its view of the ledger and its idle waker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvcached_core.errors import ConfigError
from kvcached_core.geometry import first_block
from kvcached_core.ledger import Runtime, SchedulerView, SlotGeometry
from kvcached_core.plan import Plan
from kvcached_core.scheduler.activity import ActivityReport
from kvcached_core.scheduler.governor import Governor
from kvcached_core.scheduler.granules import Granules
from kvcached_core.scheduler.idle_waker import IdleWaker
from kvcached_core.scheduler.polling import poll_while
from vllm_kvcached import nodes
from vllm_kvcached.queue import ElasticFreeQueue
from vllm_kvcached.support import instance, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager


class SchedulerMemory:
    """Sets the memory budget between two steps, on the engine's thread. The idle waker has its own thread."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        manager: KVCacheManager,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        chosen = settings(vllm_config)
        self._clock, self._sleep = clock, sleep
        self._manager = manager
        self._grant_seconds = chosen.grant_seconds
        self._watermark = vllm_config.scheduler_config.watermark
        runtime = Runtime.open(chosen.runtime_dir or None)
        self._links = nodes.start_links(vllm_config, clock)
        remote_slots = {rank: slot for link in self._links for rank, slot in link.slots.items()}
        ranks = vllm_config.parallel_config.world_size
        self._scheduler_view = SchedulerView.find(runtime, instance(vllm_config), ranks, clock, remote_slots)
        if remote_slots:
            _require_one_geometry(self._scheduler_view.geometry)
        geometry = self._scheduler_view.geometry[0]
        pool = manager.block_pool
        self.granules: Granules[Any] = _granules(pool, geometry)
        self.queue = ElasticFreeQueue(pool, self.granules)
        pool.free_block_queue = self.queue
        virtual_bytes = geometry.granule_count * geometry.granule_bytes
        self._granule_bytes = geometry.granule_bytes
        self._governor = Governor(
            self.granules,
            self._scheduler_view,
            self.queue.evict,
            chosen.spare.units_of(virtual_bytes, geometry.granule_bytes),
            chosen.idle_seconds,
            self._scheduler_view.report,
            chosen.cache_seconds,
        )
        self._idle_waker: IdleWaker | None = None
        self._closed = False
        self._preemptions = 0
        self._activity = ActivityReport(self._scheduler_view.count)
        self._activity.set_busy(False, clock())

    # -- between two steps -------------------------------------------------------------------------------

    def update(self, demand_blocks: int, busy: bool, growth_blocks: int = 0) -> None:
        """Set the budget of the next step and ask for missing memory; see Governor.update."""
        now, deadline = self._clock(), self._governor.deadline
        self._notice_sleep()
        self._activity.set_busy(busy, now)
        self._governor.update(now, demand_blocks, busy, growth_blocks)
        self._settle()
        if self._idle_waker is not None and self._governor.deadline not in (None, deadline):
            self._idle_waker.read_deadline_again()

    def release_preempted(self, demand_blocks: int, growth_blocks: int, preempted: int) -> None:
        """Give up the memory of the `preempted` requests, and report the preemption."""
        must_bytes = self._governor.must * self._granule_bytes
        self.update(demand_blocks, True, growth_blocks)
        self._scheduler_view.report("preempt", requests=preempted, must_bytes=must_bytes)

    def wait_while(self, short: Callable[[], bool]) -> None:
        """Wait at most `grant_seconds` while the next step is `short` and memory is on its way."""
        poll_while(
            lambda: self._governor.waiting and short(), self._grant_seconds, self._clock, self._look_again
        )

    def _look_again(self, seconds: float) -> None:
        """Sleep, then add to the budget the memory that arrived meanwhile."""
        self._sleep(seconds)
        self._governor.refresh()
        self._settle()

    def owes_when_idle(self) -> bool:
        """Set the budget of an engine without requests; say whether it has memory to give back."""
        if self._closed:
            return False
        self.update(0, busy=False)
        self._activity.publish(self.queue.evictions, self._preemptions)
        return self._governor.plan_gives_back

    def take_plan(self, preemptions: int) -> Plan | None:
        """Return the scheduled step's memory plan, or None. `preemptions` counts from the engine's start."""
        self._preemptions = preemptions
        self._activity.publish(self.queue.evictions, self._preemptions)
        return self._governor.take_plan()

    def _notice_sleep(self) -> None:
        """Forget the cached blocks if sleep mode made the workers give back their memory."""
        released = self._scheduler_view.released()
        if released > self._governor.released:
            self._governor.note_cache_dropped(released)

    def _settle(self) -> None:
        self.queue.settle()
        self._manager.watermark_blocks = int(self._watermark * self._governor.attainable_blocks)

    # -- for the scheduler -------------------------------------------------------------------------

    @property
    def over_target(self) -> bool:
        """Say whether requests hold more memory than other engines leave to this engine."""
        return self._governor.over_target

    @property
    def must_preempt(self) -> bool:
        """Say whether requests hold memory of another engine's floor and their grace period is over."""
        return not self._closed and self._governor.must_preempt_to(self._clock()) is not None

    @property
    def limit_blocks(self) -> int:
        """Blocks that requests may hold at the limit, without the null block."""
        return self._governor.limit * self.granules.blocks_per_granule - 1

    @property
    def is_all_here(self) -> bool:
        """Say whether the engine holds all memory up to its limit and no request uses a block."""
        return self.granules.used_blocks == 1 and self._governor.held >= self._governor.limit

    @property
    def usage(self) -> float:
        """Used blocks over attainable blocks, 0 to 1, both without the null block."""
        return min(1.0, (self.granules.used_blocks - 1) / max(1, self._governor.attainable_blocks - 1))

    def check(self) -> None:
        """Raise InvariantError if queue, granules and budget do not add up."""
        self.queue.check()
        self._governor.check()

    # -- waking an idle engine ---------------------------------------------------------------------------

    @property
    def has_idle_waker(self) -> bool:
        """Say whether the idle waker runs."""
        return self._idle_waker is not None

    def start_idle_waker(self, wake: Callable[[], Any]) -> None:
        """Start the idle waker, a thread that calls `wake` so that the engine's loop looks for work."""
        self._idle_waker = IdleWaker(
            self._scheduler_view.filenos(),
            self._scheduler_view.drain,
            lambda: self._governor.deadline,
            wake,
            self._clock,
        )
        self._idle_waker.start()

    def close(self) -> None:
        """Stop the idle waker and close the view of the ledger. A second call does nothing."""
        self._closed = True
        if self._idle_waker is not None:
            self._idle_waker.stop()
        for link in self._links:
            link.close()
        self._scheduler_view.close()


def _granules(pool: BlockPool, geometry: SlotGeometry) -> Granules[Any]:
    """Sort the blocks of vLLM's pool into granules."""
    first_blocks = [
        first_block(granule, geometry.page_bytes, geometry.stride_bytes)
        for granule in range(geometry.granule_count)
    ]
    return Granules(pool.blocks, first_blocks, geometry.blocks_per_granule)


def _require_one_geometry(ranks: Sequence[SlotGeometry]) -> None:
    """Raise ConfigError unless each granule holds the same blocks on all ranks."""
    kinds = [
        (
            of.granule_count,
            of.blocks_per_granule,
            first_block(of.granule_count, of.page_bytes, of.stride_bytes),
        )
        for of in ranks
    ]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ConfigError(
                f"rank 0 has {kinds[0][0]} granules of {kinds[0][1]} blocks, rank {rank} has {kind[0]} of "
                f"{kind[1]}: give all nodes the same kvcached.page_size, and on the host the same "
                "vm.max_map_count"
            )
