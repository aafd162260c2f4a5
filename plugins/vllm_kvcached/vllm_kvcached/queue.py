"""The free queue of vLLM's block pool, on top of granules.

A granule is a group of blocks that are mapped and unmapped together. vLLM's linked list holds only the free
blocks that the prefix cache keeps, least recently used first, as in stock. The granules hold the other free
blocks. During a step `num_free_blocks` changes only when blocks are taken or freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from kvcached_core.errors import InvariantError
from kvcached_core.scheduler.granules import Granules

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class ElasticFreeQueue(FreeKVCacheBlockQueue):
    """Hands out free blocks of the lowest granules, then of newly mapped granules, then cached blocks."""

    def __init__(self, pool: BlockPool, granules: Granules[Any]) -> None:
        super().__init__([])
        self._pool = pool
        self._granules = granules
        self.evictions = 0  # cached blocks evicted because their memory was given back
        for block in pool.blocks:
            block.prev_free_block = block.next_free_block = None
        self.settle()

    def settle(self) -> None:
        """Count the free blocks of a new budget, and set the pool's size, from which vLLM computes usage."""
        self.num_free_blocks = self._granules.free_blocks
        self._pool.num_gpu_blocks = self._granules.capacity_blocks

    # -- vLLM's contract ---------------------------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        """Return one free block. Raises ValueError if there is none."""
        if not self.num_free_blocks:
            raise ValueError("No free blocks available")
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Return n free blocks. Cached blocks come last; the pool evicts them."""
        if n == 0:
            return []
        assert self.num_free_blocks >= n, f"{n} blocks wanted, {self.num_free_blocks} free"
        popped = self._granules.take(n)
        self.num_free_blocks -= len(popped)
        if len(popped) < n:
            popped += self._evict_stale(n - len(popped))
        if len(popped) < n:
            evicted = super().popleft_n(n - len(popped))
            self._granules.hold(evicted)
            popped += evicted
        return popped

    def _evict_stale(self, count: int) -> list[KVCacheBlock]:
        """Return up to `count` cached blocks of stale granules; the pool evicts them. Evict the rest here."""
        taken, left = self._granules.take_stale(count)
        if taken:
            self.num_free_blocks -= len(taken)
            self._unlink(taken + left)
        if left:
            self._forget(left)
        return taken

    @staticmethod
    def _unlink(blocks: list[KVCacheBlock]) -> None:
        # A request's blocks stand in the list last to first, so a run of neighbours is unlinked at once.
        after = blocks[-1]
        before = after.prev_free_block
        for block in reversed(blocks):
            if block is not after:
                before.next_free_block, after.prev_free_block = after, before
                before = block.prev_free_block
            after = block.next_free_block
            block.prev_free_block = block.next_free_block = None
        before.next_free_block, after.prev_free_block = after, before

    def remove(self, block: KVCacheBlock) -> None:
        """Take a cached block out of the list because a request uses it again (a prefix-cache hit)."""
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise RuntimeError(f"remove() called on a block that is not in the list: {block}")
        before.next_free_block, after.prev_free_block = after, before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1
        self._granules.hold_one(block)

    def append(self, block: KVCacheBlock) -> None:
        """Put back a block whose content the prefix cache keeps."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put back blocks whose content the prefix cache keeps, in the order of eviction."""
        super().append_n(blocks)
        self._granules.lend(blocks)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Put back blocks whose content the prefix cache does not keep."""
        self._granules.free(blocks)
        self.num_free_blocks += len(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """Return all mapped free blocks, in the order in which they would be handed out."""
        return [*self._granules.clean(), *super().get_all_free_blocks()]

    def iter_blocks_after(self, cursor: KVCacheBlock | None) -> Iterator[KVCacheBlock]:
        """Iterate over cached blocks in the order of eviction; from the start if the cursor left the list."""
        listed = cursor is not None and cursor.next_free_block is not None
        return super().iter_blocks_after(cursor if listed else None)  # type: ignore[no-any-return]

    # -- eviction --------------------------------------------------------------------------------

    def evict(self, blocks: list[KVCacheBlock]) -> None:
        """Evict cached blocks whose memory is about to be given back; vLLM notifies their readers first."""
        self.evictions += len(blocks)
        self._forget(blocks)
        for block in blocks:
            super().remove(block)

    def _forget(self, blocks: list[KVCacheBlock]) -> None:
        self._pool._notify_reuse(blocks)
        for block in blocks:
            self._pool._maybe_evict_cached_block(block)

    def forget_unhashed(self) -> None:
        """Move blocks without a hash from the list to their granules, after a reset of the prefix cache."""
        for block in super().get_all_free_blocks():
            if block.block_hash is None:
                super().remove(block)
                self.num_free_blocks += 1  # super().remove() subtracted 1, but the block stays free
                self._granules.drop(block)

    def check(self) -> None:
        """Raise InvariantError unless list, granules and pool count the same blocks (I9)."""
        self._granules.check()
        cached = [block.block_id for block in super().get_all_free_blocks()]
        facts = {
            "free": (self.num_free_blocks, self._granules.free_blocks),
            "cached": (len(cached), self._granules.cached_blocks),
            "in use": (
                sum(block.ref_cnt > 0 for block in self._pool.blocks[1:]) + 1,
                self._granules.used_blocks,
            ),
            "pool": (self._pool.num_gpu_blocks, self.num_free_blocks + self._granules.used_blocks),
        }
        wrong = {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
        if wrong:
            raise InvariantError(f"the free queue does not add up: {wrong}")
