"""The allocator of a model with sliding windows, which has two pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from kvcached_core.errors import UnsupportedError
from kvcached_core.units import GIB
from sglang_kvcached import process_state
from sglang_kvcached.capacity import BudgetedAllocator

if TYPE_CHECKING:
    import torch


class ElasticSWAAllocator(BudgetedAllocator, SWATokenToKVPoolAllocator):
    """Two elastic allocators under one. Stock takes from both and expects neither to refuse, so granules of
    both are mapped first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.swa_req_ring:
            raise UnsupportedError(
                "kvcached: a ring buffer for each request's sliding window is not supported"
            )

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As in stock."""
        return super().alloc(need_size) if self.new_pages_available(need_size, need_size) else None

    def new_pages_available(self, num_full_pages: int, num_swa_pages: int) -> bool:
        """Map memory for these pages of both pools. Stock calls this before it takes pages."""
        return bool(
            self.full_attn_allocator.map_enough(num_full_pages)
            and self.swa_attn_allocator.map_enough(num_swa_pages)
        )

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """As in stock."""
        pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        if not self.new_pages_available(pages, pages):
            return None
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)

    def clear(self) -> None:
        """As in stock. Mapped memory is kept as long as other idle memory."""
        super().clear()
        if (memory := process_state.find_scheduler_memory()) is not None:
            memory.note_flush()

    def get_kvcache(self) -> Any:
        """Return the pools; their reported usage is the memory that they hold now."""
        self._kvcache.mem_usage = process_state.rank_memory().held_bytes / GIB
        return self._kvcache
