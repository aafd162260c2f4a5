"""Both pools of a model with sliding windows."""

from __future__ import annotations

from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator


class ElasticSWAAllocator(SWATokenToKVPoolAllocator):
    """Two elastic allocators."""
