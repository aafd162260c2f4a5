"""An allocator's answers to SGLang's scheduler: whether a request may begin, whether the next step fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_kvcached import process_state
from sglang_kvcached.prefill import ElasticPrefillBudget, ElasticSWAPrefillBudget

if TYPE_CHECKING:
    from sglang_kvcached.scheduler_memory import SchedulerMemory


class BudgetedAllocator:
    """Mixin for the allocator that the scheduler asks: answers from the budget of all page pools."""

    page_size: int

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> Any:
        """Set the step's budget, and return the prefill budget that admits its requests."""
        memory = process_state.scheduler_memory()
        memory.settle()
        memory.forget_refused()
        kind = ElasticPrefillBudget if len(memory.accounting.page_pools) == 1 else ElasticSWAPrefillBudget
        return kind(memory, self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict cached pages until this many tokens can be taken, or until no eviction helps."""
        if tree_cache is None or not tree_cache.supports_prefix_sharing():
            return
        memory = process_state.scheduler_memory()
        pages = self._pages(memory, num_tokens)
        while any(evicted := memory.accounting.pages_to_evict(pages)) and memory.prefix_cache.evict(evicted):
            pass

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        """Say whether the next step of running requests fits; if not, SGLang retracts one and asks again."""
        memory = process_state.scheduler_memory()
        memory.settle()
        is_last = requests is not None and len(requests) <= 1
        if requests is not None:
            memory.counters.note_decoding(len(requests), memory.must_bytes)
        if memory.must_retract and not is_last:
            return memory.counters.refuse_decoding()
        pages = self._pages(memory, num_tokens)
        if any(memory.accounting.missing_pages(pages)):
            memory.wait_for_pages(pages)
            self.evict_to_free_tokens(tree_cache, num_tokens)
        return not any(memory.accounting.missing_pages(pages)) or memory.counters.refuse_decoding()

    def max_new_tokens_for_memory(self, input_tokens: int, max_new_tokens: int, **kwargs: Any) -> int | None:
        """Return how many new tokens fit into the limit; None if the prompt does not fit."""
        limit = process_state.scheduler_memory().limit_pages(0) * self.page_size
        if input_tokens + 1 > limit:
            return None
        kwargs["token_capacity"] = min(kwargs["token_capacity"], limit)
        answer: int | None = super().max_new_tokens_for_memory(  # type: ignore[misc]
            input_tokens, max_new_tokens, **kwargs
        )
        return answer

    def verify_byte_accounting(self) -> list[str]:
        """Set the budget of an idle scheduler; return a sentence for each inconsistency."""
        return process_state.scheduler_memory().settle_idle()

    def _pages(self, memory: SchedulerMemory, tokens: int) -> list[int]:
        return memory.accounting.of_every_pool(-(-tokens // self.page_size))
