"""A scheduler without a model: SGLang's own pools and allocators, stock and elastic, over real memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictResult

from kvcached_core.config import Config
from kvcached_core.driver.host import HostDriver
from kvcached_core.ledger import Account, Runtime, SchedulerView, set_limit
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.units import KIB, MIB, Size
from sglang_kvcached import process_state
from sglang_kvcached.demand import Demand
from sglang_kvcached.prefix_cache_view import PrefixCacheView
from sglang_kvcached.rank_memory import RankMemory
from sglang_kvcached.rank_sync import RankSync, SingleRank
from sglang_kvcached.scheduler_memory import SchedulerMemory

CAPACITY = 64 * MIB
HEADS, HEAD_DIM, LAYERS = 2, 16, 2  # 128 bytes a row of a buffer
PAGE_BYTES = 16 * KIB  # a physical page of 128 rows: a granule of 128 slots
# Physical pages with which a granule has as many slots and bytes in each layout.
LAID_PAGE_BYTES = {"engine": PAGE_BYTES, "layer": 2 * PAGE_BYTES, "block": 2 * LAYERS * PAGE_BYTES}
IDLE_SECONDS = 2.0


class RankContext:
    """The driver, account and settings of a rank, as starting.RankStart provides them."""

    def __init__(self, folder: Path, longest_tokens: int = 64, rank: int = 0, **options: Any) -> None:
        self.settings = Config(
            **{"spare": Size(0), "page_size": Size(PAGE_BYTES), "idle_seconds": IDLE_SECONDS, **options}
        )
        self.runtime = Runtime.open(folder)
        self.driver = HostDriver(CAPACITY)
        self.capacity_bytes = CAPACITY
        self.longest_tokens = longest_tokens
        self.layout = "engine"
        self.account = Account.attach(
            self.runtime, self.driver.identity(), CAPACITY, 0, instance="one", rank=rank, name="one"
        )
        self.private = PrivateMemory(None, lambda: 0, lambda: 0)

    def lay(self, layout: str, page_bytes: int | None) -> None:
        """Choose a layout and a physical page size; None lets the plugin choose the size."""
        self.layout = layout
        page_size = None if page_bytes is None else Size(page_bytes)
        self.settings = dataclasses.replace(self.settings, page_size=page_size)

    def limit_bytes(self) -> int:
        """Return the whole capacity."""
        return CAPACITY

    def set_floor(self, floor_bytes: int) -> None:
        """Set the floor in the ledger."""
        self.account.set_floor_bytes(floor_bytes)


class Cache:
    """A prefix cache of whole requests, least recently used first."""

    def __init__(self) -> None:
        self.allocator: Any = None
        self.lent: list[torch.Tensor] = []

    def lend(self, slots: torch.Tensor) -> None:
        """Keep the slots of a request that ended."""
        self.lent.append(slots)

    def supports_prefix_sharing(self) -> bool:
        """Say yes."""
        return True

    def supports_mamba(self) -> bool:
        """Say no."""
        return False

    def supports_swa(self) -> bool:
        """Say no."""
        return False

    def evictable_size(self) -> int:
        """Return the number of slots that are kept."""
        return sum(len(slots) for slots in self.lent)

    def evict(self, params: Any) -> EvictResult:
        """Free at least this many slots, or all."""
        freed = 0
        while self.lent and freed < params.num_tokens:
            slots = self.lent.pop(0)
            freed += len(slots)
            self.allocator.free(slots)
        return EvictResult(num_tokens_evicted=freed)


def request(prompt: int = 0, generated: int = 0, generates: int = 0, ignore_eos: bool = True) -> Any:
    """Return a fake request with the fields that the plugin reads; lengths in tokens."""
    return SimpleNamespace(
        origin_input_ids=[0] * prompt,
        output_ids=[0] * generated,
        sampling_params=SimpleNamespace(max_new_tokens=generates, ignore_eos=ignore_eos),
    )


def scheduler(page_size: int, tree: Any) -> Any:
    """Return a fake scheduler with the fields that the plugin reads."""
    return SimpleNamespace(
        page_size=page_size,
        chunked_prefill_size=256,
        max_prefill_tokens=256,
        max_running_requests=64,
        running_batch=SimpleNamespace(reqs=[], batch_is_full=False),
        last_batch=None,
        waiting_queue=[],
        chunked_req=None,
        new_token_ratio_tracker=SimpleNamespace(current=0.5),
        server_args=SimpleNamespace(sleep_on_idle=False, speculative_num_draft_tokens=None),
        tree_cache=tree,
        device="cpu",
        idle_sleeper=None,
    )


class Engine:
    """One rank. The test runs its supply thread turn by turn and sets its clock."""

    def __init__(self, folder: Path, page_size: int, **options: Any) -> None:
        self.context = RankContext(folder, **options)
        self.rank_memory = RankMemory(self.context)
        process_state.use(self.rank_memory)
        self.page_size = page_size
        self.now = 0.0
        self.limit_granules = 1 << 32  # the limit set last
        self.cache: Any = Cache()
        self.scheduler = scheduler(page_size, self.cache)

    def begin(self, allocator: Any) -> None:
        """Make the scheduler memory, as when SGLang's scheduler is complete."""
        self.allocator = self.cache.allocator = allocator
        self.scheduler_view = SchedulerView.find(self.context.runtime, "one", 1, lambda: self.now)
        rank_sync = RankSync(self.scheduler_view, SingleRank(), False, lambda: self.now, self._sleep)
        prefix_cache = PrefixCacheView(self.scheduler, self.rank_memory.page_pools)
        self.memory = SchedulerMemory(self.rank_memory, Demand(self.scheduler), prefix_cache, rank_sync)
        process_state.use(self.rank_memory, self.memory)

    def turn(self) -> None:
        """Run the supply thread's turns until no work is left."""
        for _ in range(1000):
            if self.rank_memory.pool.supply_thread.turn(self.now) != 0.0:
                return
        raise AssertionError("the supply thread does not come to an end")

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.turn()

    def idle(self, seconds: float = 0.0) -> None:
        """Let time pass without requests, and assert that the accounting adds up."""
        self.now += seconds
        self.memory.note_pages_moved()
        assert self.memory.settle_idle() == []
        self.turn()

    def limit(self, granules: int) -> None:
        """Set the limit, as kvctl does."""
        self.limit_granules = granules
        set_limit(self.context.runtime, "one", granules * self.context.account.granule_bytes)
        self.turn()

    @property
    def mapped(self) -> int:
        """Granules that are mapped."""
        return self.memory.accounting.mapped

    def held(self) -> int:
        """Return the granules whose memory exists."""
        return self.rank_memory.held_bytes // self.context.account.granule_bytes

    def close(self) -> None:
        """Give everything back, and assert that nothing stays leased."""
        process_state.close()
        assert self.context.account.leased_bytes == 0
        self.context.account.detach()


def mha_pool(cls: type, slots: int, page_size: int, **more: Any) -> Any:
    """Return a pool of keys and values."""
    return cls(
        slots, page_size=page_size, dtype=torch.float32, head_num=HEADS, head_dim=HEAD_DIM, layer_num=LAYERS,
        device="cpu", enable_memory_saver=False, **more,
    )  # fmt: skip


def mla_pool(cls: type, slots: int, page_size: int) -> Any:
    """Return a pool of latents."""
    return cls(
        slots, page_size=page_size, dtype=torch.float32, kv_lora_rank=24, qk_rope_head_dim=8,
        layer_num=2 * LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip


def odd_mla_pool(cls: type, slots: int, page_size: int) -> Any:
    """Return a pool of latents whose rows of 96 bytes do not fill whole pages."""
    return cls(
        slots, page_size=page_size, dtype=torch.float32, kv_lora_rank=18, qk_rope_head_dim=6,
        layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip


def touch(kvcache: Any, slots: torch.Tensor) -> None:
    """Write and read slots in every layer; the process dies if a slot has no memory."""
    buffers = [*kvcache.k_buffer, *kvcache.v_buffer] if hasattr(kvcache, "k_buffer") else kvcache.kv_buffer
    for number, buffer in enumerate(buffers):
        buffer[slots] = float(number)
        assert bool((buffer[slots] == float(number)).all())


_runs = itertools.count()


@contextmanager
def engine(folder: Path, page_size: int, **options: Any) -> Iterator[Engine]:
    """Make an engine in its own runtime directory."""
    made = Engine(folder / f"run-{next(_runs)}", page_size, **options)
    try:
        yield made
    finally:
        made.close()
