"""The memory that SGLang's prefix cache keeps: how many pages it could free, and evicting them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_kvcached.page_pool import PagePool


class PrefixCacheView:
    """Reads `scheduler.tree_cache` for the page pools: full attention first, then the sliding window.

    Only this class evicts cached pages and counts evictions.
    """

    def __init__(self, scheduler: Any, page_pools: Sequence[PagePool]) -> None:
        """`page_pools` are all pools of the process; both methods update their `cached_pages`."""
        self.evicted_pages = 0  # since the engine began
        self._scheduler = scheduler
        self._page_pools = page_pools
        self._page_size = int(scheduler.page_size)

    def count(self) -> None:
        """Update how many pages of each pool only the prefix cache keeps."""
        tree = self._scheduler.tree_cache
        hybrid = tree.supports_swa() or tree.supports_mamba()
        tokens = [tree.full_evictable_size() if hybrid else tree.evictable_size()]
        if len(self._page_pools) > 1:
            tokens.append(tree.swa_evictable_size())
        for page_pool, count in zip(self._page_pools, tokens, strict=True):
            page_pool.cached_pages = min(int(count) // self._page_size, page_pool.owned)

    def evict(self, pages: Sequence[int]) -> int:
        """Evict at least this many cached pages of each pool (or all), least recently used first.

        Return how many pages became free.
        """
        freed = self._evict_from_tree(pages)
        self.evicted_pages += freed
        self.count()
        return freed

    def _evict_from_tree(self, pages: Sequence[int]) -> int:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        tree = self._scheduler.tree_cache
        if not tree.supports_prefix_sharing():
            return 0
        tokens = [count * self._page_size for count in pages]
        params = EvictParams(num_tokens=tokens[0], swa_num_tokens=tokens[1] if len(tokens) > 1 else 0)
        result = tree.evict(params)
        return (int(result.num_tokens_evicted) + int(result.swa_num_tokens_evicted)) // self._page_size
