"""The memory of one worker: its account in the ledger, its driver and its pool."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.platforms import current_platform

from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import is_host, open_for_engine
from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry, choose_page_bytes, make_geometry
from kvcached_core.ledger.remote.agent import NodeAgent
from kvcached_core.plan import Plan
from kvcached_core.startup.announce import (
    describe_to_ledger,
    floor_bytes,
    log_start,
    require_limit_for_request,
)
from kvcached_core.worker.pool import ElasticPool
from vllm_kvcached import nodes
from vllm_kvcached.placement import (
    Placement,
    block_step,
    blocks_of_longest_request,
    bytes_per_block,
    placement,
)
from vllm_kvcached.ranks import gather
from vllm_kvcached.sleeping import RankSleep
from vllm_kvcached.starting import VllmRankStart
from vllm_kvcached.support import instance, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

_RAISE_LIMIT = "raise kvcached.limit (or --kv-cache-memory-bytes) or lower --max-model-len"


class _Reservation(NamedTuple):
    """The blocks that a rank could reserve addresses for. The ranks then agree on one number."""

    blocks: int
    step: int


class WorkerMemory:
    """The elastic memory of one rank."""

    def __init__(self, vllm_config: VllmConfig, rank: int) -> None:
        self._vllm_config = vllm_config
        self._settings = settings(vllm_config)
        self._rank = rank
        self._start = VllmRankStart(vllm_config, self._settings, rank)
        self._device = torch.device("cpu")
        self._driver: Driver | None = None
        self._pool: ElasticPool | None = None
        self._sleep: RankSleep | None = None
        self._agent: NodeAgent | None = None
        self._capacity_bytes = 0

    # -- start, in vLLM's order ---------------------------------------------------------------------------

    def make_room_for_context(self, local_rank: int) -> None:
        """Wait until a CUDA context fits on the device. Raises CapacityError."""
        self._start.make_room_on(local_rank)

    def open(self, device: torch.device) -> None:
        """Open the driver on the worker's device and enter the device's ledger."""
        self._device = device
        self._driver = open_for_engine(self._settings, device.type, device.index)
        self._capacity_bytes = self._driver.memory().total_bytes
        self._start.enter_with(device, self._driver.identity(), self._capacity_bytes, self._mapped_bytes)

    def wait_for_room(self) -> None:
        """Wait until the ledger has promised every rank the memory it will take.

        Raises CapacityError, with the numbers, or UnsupportedError for a node with another kind of cache.
        """
        nodes.require_same_cache(self._vllm_config, self._settings, self._rank)
        self._start.wait_to_load(self._opened().memory, is_host(self._device.type))

    def preferred_layouts(self, names: list[str]) -> list[str]:
        """Put layouts whose outermost dimension is the block first, unless the setting leaves it to vLLM."""
        if self._settings.layout == "engine":
            return names
        return sorted(names, key=lambda name: not name.startswith("B"))

    def virtual_bytes(self, specs: dict[str, KVCacheSpec]) -> int:
        """Return the bytes of address space to reserve. Every rank gets the same number of blocks."""
        driver, chosen = self._opened(), self._settings
        size_bytes = max(chosen.virtual.of(self._capacity_bytes), self._start.limit_bytes())
        if self._vllm_config.model_config.original_max_model_len == -1:
            # vLLM will choose the longest request that fits into this size, so it must fit into the limit.
            size_bytes = min(size_bytes, self._start.limit_bytes())
        per_block = bytes_per_block(specs)
        mine = _Reservation(
            min(size_bytes // per_block, chosen.max_blocks), block_step(specs, driver.granularity_bytes)
        )
        ranks = gather(mine)
        step = math.lcm(*(rank.step for rank in ranks))
        blocks: int = min(rank.blocks for rank in ranks) // step * step
        return blocks * per_block

    def allocate(self, kv_cache_config: KVCacheConfig, size_bytes: int) -> torch.Tensor:
        """Create the pool and return the KV cache as an int8 tensor of shape (size_bytes,)."""
        if self._pool is not None:
            raise InvariantError("vLLM allocated its KV cache twice")
        driver = self._opened()
        where = placement(kv_cache_config)
        geometry = self._geometry(where, kv_cache_config.num_blocks, driver)
        self._start.set_floor(self._floor_bytes(geometry, kv_cache_config))
        account = self._start.account
        describe_to_ledger(account, geometry)
        self._pool = ElasticPool(
            driver, geometry, account, size_bytes=size_bytes, private_bytes=self._start.private.now
        )
        self._pool.begin_warm_up()
        block_tokens = self._vllm_config.cache_config.block_size or 0
        log_start(driver.name, geometry, block_tokens, account)
        return self._pool.tensor

    def require_allocated(self, times: int) -> None:
        """Raise InvariantError unless vLLM took its KV cache from the pool."""
        if times != 1:
            raise InvariantError(f"vLLM's allocation of the KV cache was seen {times} times, expected once")

    def begin_service(self, peak_activation_bytes: int) -> None:
        """End the warm-up: from now on access to unmapped memory faults, and the supply thread runs."""
        assert self._pool is not None
        self._pool.end_warm_up()
        self._start.end(int(peak_activation_bytes))
        config = self._vllm_config
        self._start.account.grow_with(nodes.local_ranks(config))
        self._pool.start()
        self._agent = nodes.start_agent(config, self._settings, instance(config), self._rank)
        self._sleep = RankSleep(self._pool, self._opened(), self._start)

    # -- service -----------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Map and unmap memory as planned. Kernels launched after this call see the change."""
        assert self._pool is not None
        self._pool.apply(plan, _stream())

    @property
    def sleep(self) -> RankSleep:
        """Sleep mode. Raises InvariantError before the service begins."""
        if self._sleep is None:
            raise InvariantError("an engine cannot sleep before it serves")
        return self._sleep

    def stats(self) -> dict[str, int]:
        """Return the pool's counts."""
        assert self._pool is not None
        return dict(self._pool.stats()._asdict())

    def check(self) -> None:
        """Raise InvariantError if the counts of pool or account contradict each other."""
        assert self._pool is not None
        self._pool.check()
        self._start.account.check()

    def close(self) -> None:
        """Give all memory back and leave the ledger. A second call does nothing."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
        self._start.stop()
        pool, driver = self._pool, self._driver
        self._pool = self._driver = None
        try:
            if pool is not None:
                pool.close()
            elif driver is not None:
                driver.close()
        finally:
            self._start.close()

    def _mapped_bytes(self) -> int:
        return 0 if self._pool is None else self._pool.mapped_bytes()

    # -- parts of the start -------------------------------------------------------------------------------

    def _opened(self) -> Driver:
        if self._driver is None:
            raise InvariantError("the driver is opened with the device")
        return self._driver

    def _geometry(self, where: Placement, block_count: int, driver: Driver) -> Geometry:
        wanted = self._settings.page_size
        strides = gather(where.stride_bytes)
        rank = torch.distributed.get_rank() if len(strides) > 1 else 0
        pages = choose_page_bytes(
            strides,
            len(where.starts),
            driver.granularity_bytes,
            block_count,
            driver.max_mappings,
            exact=driver.name == "host",
            wanted_bytes=None if wanted is None else wanted.of(self._capacity_bytes),
        )
        return make_geometry(
            pages[rank], where.stride_bytes, where.starts, block_count, driver.granularity_bytes
        )

    def _floor_bytes(self, geometry: Geometry, kv_cache_config: KVCacheConfig) -> int:
        """Return the floor in bytes: the setting, or one request of the maximum length plus the null block.

        Raises ConfigError if that request exceeds the limit. With several groups of layers its size is only
        an upper bound, so a lower limit is allowed.
        """
        blocks = 1 + blocks_of_longest_request(self._vllm_config, kv_cache_config)
        needed_bytes, limit_bytes = geometry.bytes_of_blocks(blocks), self._start.limit_bytes()
        if len(kv_cache_config.kv_cache_groups) == 1:
            length = self._vllm_config.model_config.max_model_len
            require_limit_for_request(limit_bytes, needed_bytes, length, _RAISE_LIMIT)
        return floor_bytes(self._settings, self._capacity_bytes, min(needed_bytes, limit_bytes))


def _stream() -> int:
    """Return the stream on which the next step's kernels are launched."""
    return 0 if current_platform.is_cpu() else int(torch.cuda.current_stream().cuda_stream)
