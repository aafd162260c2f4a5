"""The elastic memory of one rank, made while SGLang makes its pools.

In SGLang a scheduler process is also the worker of its rank, so it maps and unmaps by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvcached_core.config import Config
from kvcached_core.driver.base import Driver
from kvcached_core.errors import InvariantError
from kvcached_core.geometry import Geometry
from kvcached_core.ledger import Account
from kvcached_core.plan import Plan
from kvcached_core.startup.announce import (
    describe_to_ledger,
    floor_bytes,
    log_start,
    require_limit_for_request,
)
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.worker.pool import ElasticPool
from sglang_kvcached.buffer_spec import BufferSpec, geometry_of
from sglang_kvcached.page_pool import FreeList, PagePool

if TYPE_CHECKING:
    import torch

_RAISE_LIMIT = "raise kvcached.limit or lower --context-length"
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

        With two pools a ledger granule is one physical page: granules of both pools are a multiple of it.

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
        log_start(context.driver.name, geometry, spec.page_size, context.account)
        return Reservation(self, page_pool, tensor)

    def _describe(self, geometry: Geometry, is_one_of_two: bool) -> None:
        """Tell the ledger the sizes of its granules and blocks."""
        account, page_bytes = self._context.account, geometry.page_bytes
        if not is_one_of_two:
            self.block_bytes = geometry.stride_bytes * len(geometry.starts)
            describe_to_ledger(account, geometry)
            return
        self.block_bytes = _SHARED_BLOCK_BYTES
        blocks = page_bytes // _SHARED_BLOCK_BYTES
        pages = self._context.capacity_bytes // page_bytes
        account.describe(
            page_bytes=page_bytes,
            granule_bytes=page_bytes,
            granule_count=pages,
            blocks_per_granule=blocks,
            block_count=blocks * pages,
            stride_bytes=_SHARED_BLOCK_BYTES,
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
        """Map and unmap memory as planned. Kernels launched on `stream` after this call see the change."""
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
        virtual_bytes = geometry.granule_count * geometry.granule_bytes
        self._needed_bytes += min(virtual_bytes, geometry.bytes_of_blocks(pages))
        require_limit_for_request(
            context.limit_bytes(), self._needed_bytes, context.longest_tokens, _RAISE_LIMIT
        )
        context.set_floor(floor_bytes(context.settings, context.capacity_bytes, self._needed_bytes))
