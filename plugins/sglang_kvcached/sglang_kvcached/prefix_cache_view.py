"""SGLang's prefix cache, as far as it lends memory: how much it keeps that nobody uses; taking it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_kvcached.page_pool import PagePool


class PrefixCacheView:
    """Reads `scheduler.tree_cache`. The first sheet is full attention, the second the sliding window."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._page_size = int(scheduler.page_size)

    def count(self, sheets: Sequence[PagePool]) -> None:
        """Tell every sheet how many of its pages only the cache keeps."""
        tree = self._scheduler.tree_cache
        hybrid = tree.supports_swa() or tree.supports_mamba()
        tokens = [tree.full_evictable_size() if hybrid else tree.evictable_size()]
        if len(sheets) > 1:
            tokens.append(tree.swa_evictable_size())
        for sheet, count in zip(sheets, tokens, strict=True):
            sheet.cached_pages = min(int(count) // self._page_size, sheet.owned)

    def evict(self, pages: Sequence[int]) -> int:
        """Take back so many pages of each sheet, the least recently used first; return how many came."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        tree = self._scheduler.tree_cache
        if not tree.supports_prefix_sharing():
            return 0
        tokens = [count * self._page_size for count in pages]
        params = EvictParams(num_tokens=tokens[0], swa_num_tokens=tokens[1] if len(tokens) > 1 else 0)
        result = tree.evict(params)
        return (int(result.num_tokens_evicted) + int(result.swa_num_tokens_evicted)) // self._page_size
