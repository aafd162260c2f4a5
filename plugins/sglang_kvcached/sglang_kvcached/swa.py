"""Both pools of a model with sliding windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from kvcached_core.errors import UnsupportedError
from kvcached_core.units import GIB
from sglang_kvcached import process_state
from sglang_kvcached.capacity import Capacity

if TYPE_CHECKING:
    import torch


class ElasticSWAAllocator(Capacity, SWATokenToKVPoolAllocator):
    """Two elastic allocators. Stock takes from both at once and does not expect that one has to say no:
    what both need is mapped before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.swa_req_ring:
            raise UnsupportedError("kvcached: sliding windows in a ring for each request are not supported")

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As in stock."""
        return super().alloc(need_size) if self.new_pages_available(need_size, need_size) else None

    def new_pages_available(self, num_full_pages: int, num_swa_pages: int) -> bool:
        """Make so many pages of both available; stock asks this before it takes them."""
        return bool(
            self.full_attn_allocator.ensure(num_full_pages) and self.swa_attn_allocator.ensure(num_swa_pages)
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
        """As in stock; memory that is here stays for as long as other idle memory does."""
        super().clear()
        if (service := process_state.service()) is not None:
            service.flushed()

    def get_kvcache(self) -> Any:
        """Return the pools; their usage is what is held now."""
        self._kvcache.mem_usage = process_state.current().held_bytes / GIB
        return self._kvcache
