"""SGLang's allocators with a free list that holds only pages of mapped granules."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from kvcached_core.errors import UnsupportedError
from sglang_kvcached import process_state
from sglang_kvcached.capacity import BudgetedAllocator
from sglang_kvcached.page_pool import PagePool
from sglang_kvcached.pools import reservation_of


class MappedFreeList(BudgetedAllocator):
    """Mixin that maps granules before stock code reads the free list, which is then long enough.

    `available_size()` counts the same slots as in stock: all free ones, mapped or not.
    """

    size: int
    page_size: int
    device: Any
    free_pages: torch.Tensor
    need_sort: bool
    _kvcache: Any
    _page_pool: PagePool | None = None
    _pool_index = 0

    def _claim(self) -> None:
        """Become the owner of the pool's pages."""
        if self.need_sort:
            raise UnsupportedError("kvcached: PD disaggregation is not supported")
        reservation = reservation_of(self._kvcache)
        self._pool_index = reservation.rank_memory.claim(reservation.page_pool, self)
        self._page_pool = reservation.page_pool

    @property
    def page_pool(self) -> PagePool:
        """The page pool that this allocator owns."""
        assert self._page_pool is not None
        return self._page_pool

    def clear(self) -> None:
        """As in stock. Mapped memory is kept as long as other idle memory."""
        if self._page_pool is None:
            self._claim()
        super().clear()  # type: ignore[misc]
        memory = process_state.find_scheduler_memory()
        self.page_pool.free_all()
        if memory is not None and len(memory.accounting.page_pools) == 1:
            memory.note_flush()  # with two pools ElasticSWAAllocator notes it once for both

    def available_size(self) -> int:
        """Return the number of free slots, mapped or not."""
        return (self.free_count() + self.page_pool.unlisted) * self.page_size

    def get_all_free_pages(self) -> torch.Tensor:
        """Return all free pages, mapped or not."""
        unlisted = self.page_pool.unlisted_pages(self.device)
        return torch.cat([self.free_tensor(), *unlisted])

    def map_enough(self, pages: int) -> bool:
        """Map granules until the free list has this many pages; False if the budget is too small."""
        page_pool, memory = self.page_pool, process_state.find_scheduler_memory()
        short = pages - self.free_count()
        if short > 0 and memory is not None:
            mapped = memory.map_pages(self._pool_index, short)
            ranges = [
                torch.arange(first, end, dtype=torch.int64, device=self.device) for _, first, end in mapped
            ]
            self.set_free(torch.cat([self.free_pages, *ranges]))
            memory.apply_plan()
        if pages > self.free_count():
            return False
        page_pool.note_taken(pages)
        if memory is not None:
            memory.note_pages_moved()
        return True

    def _note_freed(self) -> None:
        self.page_pool.note_freed()
        if (memory := process_state.find_scheduler_memory()) is not None:
            memory.note_pages_moved()

    # -- the free list -----------------------------------------------------------------------------------

    def free_count(self) -> int:
        """Return the number of free pages in mapped granules."""
        return len(self.free_pages)

    def free_tensor(self) -> torch.Tensor:
        """Return the free pages in mapped granules."""
        return self.free_pages

    def set_free(self, pages: torch.Tensor) -> None:
        """Replace the free list by `pages`."""
        self.free_pages = pages


class ElasticPagedAllocator(MappedFreeList, PagedTokenToKVPoolAllocator):
    """Allocates pages of several slots."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As in stock."""
        return super().alloc(need_size) if self.map_enough(need_size // self.page_size) else None

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """As in stock. Stock kernels do not check the length of the free list."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self.map_enough(num_new_pages):
            return None
        return super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            num_new_pages=num_new_pages,
        )

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """As in stock."""
        pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc) if self.map_enough(pages) else None

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        super()._release_page_ids(*page_ids)
        self._note_freed()


class ElasticTokenAllocator(MappedFreeList, TokenToKVPoolAllocator):
    """Allocates pages of one slot."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As in stock."""
        return super().alloc(need_size) if self.map_enough(need_size) else None

    def free(self, free_index: torch.Tensor) -> None:
        """As in stock."""
        super().free(free_index)
        self._note_freed()
