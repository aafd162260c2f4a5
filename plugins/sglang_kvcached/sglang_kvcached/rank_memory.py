"""The elastic memory of one rank, made while SGLang makes its pools.

In SGLang a scheduler process is also the worker of its rank, so it maps and unmaps by itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvcached_core.config import Config
from kvcached_core.driver.base import Driver
from kvcached_core.errors import ConfigError, InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.ledger import Account
from kvcached_core.plan import Plan
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.units import format_size
from kvcached_core.worker.pool import ElasticPool
from sglang_kvcached.buffer_spec import BufferSpec, geometry_of
from sglang_kvcached.page_pool import FreeList, PagePool

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_SHARED_BLOCK_BYTES = 64  # the ledger block of two pools: pages of both are a multiple of it


class RankContext(Protocol):
    """The driver, account and settings of a rank; starting.RankStart provides them."""

    settings: Config
    longest_tokens: int

    @property
    def driver(self) -> Driver: ...
    @property
    def account(self) -> Account: ...
    @property
    def private(self) -> PrivateMemory: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def layout(self) -> str: ...
    def limit_bytes(self) -> int: ...
    def set_floor(self, floor_bytes: int) -> None: ...


class Reservation(NamedTuple):
    """The memory reserved for one pool: its pages, and the int8 tensor over all its buffers."""

    rank_memory: RankMemory
    page_pool: PagePool
    tensor: torch.Tensor


class RankMemory:
    """The elastic pool behind SGLang's pools, and the rank's account in the ledger."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._pool: ElasticPool | None = None
        self.page_pools: list[PagePool] = []
        self.block_bytes = 0
        self._needed_bytes = 0

    @property
    def settings(self) -> Config:
        """The engine's settings."""
        return self._context.settings

    @property
    def layout(self) -> str:
        """The layout that `layouts.chosen` returns. Raises UnsupportedError."""
        return self._context.layout

    @property
    def account(self) -> Account:
        """The rank's account."""
        return self._context.account

    @property
    def pool(self) -> ElasticPool:
        """The elastic pool. Raises InvariantError before a pool of SGLang has reserved addresses."""
        if self._pool is None:
            raise InvariantError("no elastic KV pool was made")
        return self._pool

    @property
    def has_owner(self) -> bool:
        """Say whether an allocator owns the slots: a pool made from now on shares them and stays stock."""
        return any(page_pool.owner is not None for page_pool in self.page_pools)

    @property
    def held_bytes(self) -> int:
        """Memory that exists for the KV cache now, including spare granules."""
        return self._context.account.ready_bytes

    def mapped_bytes(self) -> int:
        """Return the mapped bytes. May be called from any thread."""
        return 0 if self._pool is None else self._pool.mapped_bytes()

    def reserve(self, spec: BufferSpec, is_one_of_two: bool = False) -> Reservation:
        """Reserve addresses for a pool; only its first granule has memory.

        With two pools a ledger granule is one physical page, so granules of both are a whole number of them.

        Raises UnsupportedError if no geometry will do, ConfigError if the limit is too low, CapacityError if
        there is no memory for the first granule.
        """
        if self._pool is not None and not is_one_of_two:
            raise InvariantError("SGLang made a second KV pool before an allocator owned the first")
        context = self._context
        wanted = context.settings.page_size
        wanted_bytes = None if wanted is None else wanted.of(context.capacity_bytes)
        if self.page_pools:
            wanted_bytes = self.page_pools[0].geometry.page_bytes
        geometry = geometry_of(spec, context.driver, wanted_bytes)
        page_pool = PagePool(geometry, spec.page_count - 1, spec.buffers if is_one_of_two else 1)
        self._set_floor(spec, page_pool)
        if self._pool is None:
            self._describe(geometry, is_one_of_two)
            self._pool = ElasticPool(
                context.driver, geometry, context.account, private_bytes=context.private.now,
                pages_per_ledger_granule=1 if is_one_of_two else None,
            )  # fmt: skip
            tensor = self._pool.tensor
        else:
            tensor = self._pool.add(geometry)
        self.page_pools.append(page_pool)
        self._log_start(spec, page_pool)
        return Reservation(self, page_pool, tensor)

    def _describe(self, geometry: Geometry, is_one_of_two: bool) -> None:
        """Tell the ledger the sizes of its granules and blocks."""
        physical = geometry.page_bytes
        pages = 1 if is_one_of_two else len(geometry.starts)
        self.block_bytes = _SHARED_BLOCK_BYTES if is_one_of_two else geometry.stride_bytes * pages
        blocks = physical // _SHARED_BLOCK_BYTES if is_one_of_two else geometry.blocks_per_granule
        count = self._context.capacity_bytes // physical if is_one_of_two else geometry.granule_count
        self._context.account.describe(
            page_bytes=physical,
            granule_bytes=physical * pages,
            granule_count=count,
            blocks_per_granule=blocks,
            block_count=blocks * count if is_one_of_two else geometry.block_count,
            stride_bytes=self.block_bytes // pages,
        )

    def claim(self, page_pool: PagePool, owner: FreeList) -> int:
        """Make an allocator the owner of a page pool; return the pool's number.

        Raises InvariantError if it has another owner.
        """
        if page_pool.owner is not None and page_pool.owner is not owner:
            raise InvariantError("two allocators were made for one elastic KV pool")
        page_pool.owner = owner
        return self.page_pools.index(page_pool)

    def apply(self, plan: Plan, stream: int, also: tuple[int, ...]) -> None:
        """Carry out a plan; kernels launched on `stream` after this see its memory."""
        self.pool.apply(plan, stream, also)

    def check(self) -> None:
        """Raise InvariantError if pages, pool or account do not add up."""
        for page_pool in self.page_pools:
            page_pool.check()
        self.pool.check()
        self._context.account.check()

    def close(self) -> None:
        """Give all memory back; the tensors must not be used afterwards. A second call does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _set_floor(self, spec: BufferSpec, page_pool: PagePool) -> None:
        """Set the floor: the setting, or the memory of one request of the maximum length and of page 0.

        Raises ConfigError if the limit is lower, CapacityError if the floors do not fit together.
        """
        context, geometry = self._context, page_pool.geometry
        pages = 1 + -(-context.longest_tokens // spec.page_size)
        granules = min(geometry.granule_count, -(-pages // geometry.blocks_per_granule))
        self._needed_bytes += granules * geometry.granule_bytes
        limit = context.limit_bytes()
        if self._needed_bytes > limit:
            raise ConfigError(
                f"the limit of {format_size(limit)} is less than the {format_size(self._needed_bytes)} that "
                f"one request of {context.longest_tokens} tokens needs: raise kvcached.limit or lower "
                "--context-length"
            )
        floor = context.settings.floor
        context.set_floor(self._needed_bytes if floor is None else floor.of(context.capacity_bytes))

    def _log_start(self, spec: BufferSpec, page_pool: PagePool) -> None:
        account = self._context.account
        _log.info(
            "kvcached backend: driver %s, %s (%d tokens), virtual capacity %s, floor %s, limit %s, "
            "engine %s in ledger %s",
            self._context.driver.name,
            page_pool.geometry.describe(),
            page_pool.geometry.blocks_per_granule * spec.page_size,
            format_size(page_pool.geometry.granule_count * page_pool.geometry.granule_bytes),
            format_size(account.floor_bytes),
            format_size(account.limit_bytes),
            account.name,
            account.ledger_path,
        )
