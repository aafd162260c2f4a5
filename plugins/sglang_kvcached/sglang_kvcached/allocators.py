"""SGLang's allocators with a free list that holds only pages that have memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from kvcached_core.errors import UnsupportedError
from sglang_kvcached import process_state
from sglang_kvcached.capacity import Capacity
from sglang_kvcached.page_pool import PagePool
from sglang_kvcached.pools import reservation_of

if TYPE_CHECKING:
    pass

_SITES = ("sglang.srt.mem_cache.kv_cache_configurator", "sglang.srt.mem_cache.allocator.swa")


def rebind() -> None:
    """Replace the names of the two modules that build allocators; may be repeated."""
    from sglang_kvcached.swa import ElasticSWAAllocator

    ours = {
        "TokenToKVPoolAllocator": ElasticTokenAllocator,
        "SWATokenToKVPoolAllocator": ElasticSWAAllocator,
        "PureSWATokenToKVPoolAllocator": _refuse_pure_swa,
    }
    for site in _SITES:
        module = importlib.import_module(site)
        for name, replacement in ours.items():
            # A module's own class stays: the elastic one is built from it.
            if getattr(getattr(module, name, None), "__module__", site) != site:
                setattr(module, name, replacement)


def _refuse_pure_swa(*_: Any, **__: Any) -> None:
    raise UnsupportedError("kvcached: models whose every layer is a sliding window are not supported")


class _Elastic(Capacity):
    """Maps granules before stock code reads the free list, which it then finds long enough.

    `available_size()` stays what it is in stock: all slots that nobody holds, with memory or without.
    """

    size: int
    page_size: int
    device: Any
    free_pages: torch.Tensor
    need_sort: bool
    _kvcache: Any
    _sheet: PagePool | None = None
    _at = 0

    def _claim(self) -> None:
        """Own the pages of the pool, and list those that have memory."""
        if self.need_sort:
            raise UnsupportedError("kvcached: PD disaggregation is not supported")
        reservation = reservation_of(self._kvcache)
        self._at = reservation.memory.claim(reservation.sheet, self)
        self._sheet = reservation.sheet

    @property
    def sheet(self) -> PagePool:
        """The pages this allocator owns."""
        assert self._sheet is not None
        return self._sheet

    def clear(self) -> None:
        """As in stock; memory that is here stays for as long as other idle memory does."""
        if self._sheet is None:
            self._claim()
        super().clear()  # type: ignore[misc]
        service = process_state.service()
        self.sheet.cleared()
        if service is not None and len(service.books.sheets) == 1:
            service.flushed()  # else who has all of them does

    def available_size(self) -> int:
        """Return all slots that nobody holds."""
        return (self.free_count() + self.sheet.unlisted) * self.page_size

    def get_all_free_pages(self) -> torch.Tensor:
        """Return all pages that nobody holds."""
        unlisted = self.sheet.unlisted_pages(self.device)
        return torch.cat([self.free_tensor(), *unlisted])

    def ensure(self, pages: int) -> bool:
        """Make the free list long enough for so many pages; False if memory for them cannot be had now."""
        sheet, service = self.sheet, process_state.service()
        short = pages - self.free_count()
        if short > 0 and service is not None:
            opened = service.open(self._at, short)
            ranges = [
                torch.arange(first, end, dtype=torch.int64, device=self.device) for _, first, end in opened
            ]
            self.set_free(torch.cat([self.free_pages, *ranges]))
            service.carry()
        if pages > self.free_count():
            return False
        sheet.took(pages)
        if service is not None:
            service.touched()
        return True

    def _freed(self) -> None:
        self.sheet.freed()
        if (service := process_state.service()) is not None:
            service.touched()

    # -- the free list -----------------------------------------------------------------------------------

    def free_count(self) -> int:
        """Return the free pages that have memory."""
        return len(self.free_pages)

    def free_tensor(self) -> torch.Tensor:
        """Return them."""
        return self.free_pages

    def set_free(self, pages: torch.Tensor) -> None:
        """Put others in their place."""
        self.free_pages = pages


class ElasticPagedAllocator(_Elastic, PagedTokenToKVPoolAllocator):
    """Pages of several slots."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As in stock."""
        return super().alloc(need_size) if self.ensure(need_size // self.page_size) else None

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
        """As in stock, whose kernels read the free list without asking how long it is."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self.ensure(num_new_pages):
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
        return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc) if self.ensure(pages) else None

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        super()._release_page_ids(*page_ids)
        self._freed()


class ElasticTokenAllocator(_Elastic, TokenToKVPoolAllocator):
    """Pages of one slot."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """As in stock."""
        return super().alloc(need_size) if self.ensure(need_size) else None

    def free(self, free_index: torch.Tensor) -> None:
        """As in stock."""
        super().free(free_index)
        self._freed()
