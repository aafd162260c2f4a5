"""The elastic memory of one rank, made as SGLang makes its pools: a scheduler is its own worker."""

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
_BLOCK_BYTES = 64  # what the ledger counts in where pages of two pools differ: both are a multiple of it


class RankContext(Protocol):
    """What a rank has before it makes its pools: see starting.RankStart."""

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
    """What a pool was given: its pages, and the int8 tensor over all its lanes."""

    memory: RankMemory
    sheet: PagePool
    tensor: torch.Tensor


class RankMemory:
    """A pool of pages behind SGLang's pools, and the ledger's account for them."""

    def __init__(self, place: RankContext) -> None:
        self._place = place
        self._pool: ElasticPool | None = None
        self.sheets: list[PagePool] = []
        self.block_bytes = 0
        self._needed_bytes = 0

    @property
    def settings(self) -> Config:
        """The engine's settings."""
        return self._place.settings

    @property
    def layout(self) -> str:
        """How a token's keys and values lie, as layouts.chosen() says. Raises UnsupportedError."""
        return self._place.layout

    @property
    def account(self) -> Account:
        """The rank's account."""
        return self._place.account

    @property
    def pool(self) -> ElasticPool:
        """The pages. Raises InvariantError before a pool of SGLang's has reserved any."""
        if self._pool is None:
            raise InvariantError("no elastic KV pool was made")
        return self._pool

    @property
    def is_claimed(self) -> bool:
        """Say whether allocators own the slots: a pool that is made now shares them, and stays stock."""
        return any(sheet.owner is not None for sheet in self.sheets)

    @property
    def held_bytes(self) -> int:
        """Memory that exists for the KV cache now, spare pages included."""
        return self._place.account.ready_bytes

    def mapped_bytes(self) -> int:
        """Return what is mapped; from any thread."""
        return 0 if self._pool is None else self._pool.mapped_bytes()

    def reserve(self, lanes: BufferSpec, several: bool = False) -> Reservation:
        """Reserve addresses for a pool; its first granule has memory. `several`: there are two of them.

        The ledger then counts in single pages, of which granules of both are a whole number.

        Raises UnsupportedError for a geometry that cannot be, ConfigError for a limit that is too low,
        CapacityError where even the first granule cannot be had.
        """
        if self._pool is not None and not several:
            raise InvariantError("SGLang made a second KV pool before anybody owned the first")
        place = self._place
        wanted = place.settings.page_size
        wanted_bytes = None if wanted is None else wanted.of(place.capacity_bytes)
        if self.sheets:
            wanted_bytes = self.sheets[0].geometry.page_bytes
        geometry = geometry_of(lanes, place.driver, wanted_bytes)
        sheet = PagePool(geometry, lanes.page_count - 1, lanes.number if several else 1)
        self._set_floor(lanes, sheet)
        if self._pool is None:
            self._describe(geometry, several)
            unit_pages = 1 if several else None
            self._pool = ElasticPool(
                place.driver, geometry, place.account, private_bytes=place.private.now, unit_pages=unit_pages
            )
            tensor = self._pool.tensor
        else:
            tensor = self._pool.add(geometry)
        self.sheets.append(sheet)
        self._log_start(lanes, sheet)
        return Reservation(self, sheet, tensor)

    def _describe(self, geometry: Geometry, several: bool) -> None:
        """Tell the ledger what is counted in."""
        pages = 1 if several else len(geometry.starts)
        self.block_bytes = _BLOCK_BYTES if several else geometry.stride_bytes * pages
        blocks = geometry.page_bytes // _BLOCK_BYTES if several else geometry.blocks_per_granule
        count = self._place.capacity_bytes // geometry.page_bytes if several else geometry.granule_count
        self._place.account.describe(
            page_bytes=geometry.page_bytes,
            granule_bytes=geometry.page_bytes * pages,
            granule_count=count,
            blocks_per_granule=blocks,
            block_count=blocks * count if several else geometry.block_count,
            stride_bytes=self.block_bytes // pages,
        )

    def claim(self, sheet: PagePool, owner: FreeList) -> int:
        """Let an allocator own a sheet's pages; returns its number. Raises InvariantError if it has one."""
        if sheet.owner is not None and sheet.owner is not owner:
            raise InvariantError("two allocators were made for one elastic KV pool")
        sheet.owner = owner
        return self.sheets.index(sheet)

    def apply(self, plan: Plan, stream: int, also: tuple[int, ...]) -> None:
        """Carry out a plan; kernels launched on `stream` after this see its memory."""
        self.pool.apply(plan, stream, also)

    def check(self) -> None:
        """Raise InvariantError if pages, pool or account do not add up."""
        for sheet in self.sheets:
            sheet.check()
        self.pool.check()
        self._place.account.check()

    def close(self) -> None:
        """Give all memory back; the tensors must not be used after. May be repeated."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _set_floor(self, lanes: BufferSpec, sheet: PagePool) -> None:
        """Set the floor: as told, or what one request of the maximum length needs of all pools, with page 0.

        Raises ConfigError if the limit is lower, CapacityError if the floors do not fit together.
        """
        place, geometry = self._place, sheet.geometry
        pages = 1 + -(-place.longest_tokens // lanes.page_size)
        granules = min(geometry.granule_count, -(-pages // geometry.blocks_per_granule))
        self._needed_bytes += granules * geometry.granule_bytes
        limit = place.limit_bytes()
        if self._needed_bytes > limit:
            raise ConfigError(
                f"the limit of {format_size(limit)} is less than the {format_size(self._needed_bytes)} that "
                f"one request of {place.longest_tokens} tokens needs: raise kvcached.limit or lower "
                "--context-length"
            )
        floor = place.settings.floor
        place.set_floor(self._needed_bytes if floor is None else floor.of(place.capacity_bytes))

    def _log_start(self, lanes: BufferSpec, sheet: PagePool) -> None:
        account = self._place.account
        _log.info(
            "kvcached backend: driver %s, %s (%d tokens), virtual capacity %s, floor %s, limit %s, "
            "engine %s in ledger %s",
            self._place.driver.name,
            sheet.geometry.describe(),
            sheet.geometry.blocks_per_granule * lanes.page_size,
            format_size(sheet.geometry.granule_count * sheet.geometry.granule_bytes),
            format_size(account.floor_bytes),
            format_size(account.limit_bytes),
            account.name,
            account.ledger_path,
        )
