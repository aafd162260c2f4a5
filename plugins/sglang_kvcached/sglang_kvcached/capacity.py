"""The scheduler's questions to an allocator: what may begin, what may go on. Here the budget speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_kvcached import process_state
from sglang_kvcached.prefill import ElasticPrefillBudget, ElasticSWAPrefillBudget

if TYPE_CHECKING:
    from sglang_kvcached.scheduler_memory import SchedulerMemory


class Capacity:
    """Answers for the allocator that the scheduler knows, over all sheets of the process."""

    page_size: int

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> Any:
        """Settle the budget, and return what may begin in this step."""
        service = process_state.required_service()
        service.settle()
        service.looked_at_queue()
        kind = ElasticPrefillBudget if len(service.books.sheets) == 1 else ElasticSWAPrefillBudget
        return kind(service, self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict until so many tokens can be had, or nothing more can be evicted."""
        if tree_cache is None or not tree_cache.supports_prefix_sharing():
            return
        service = process_state.required_service()
        pages = self._pages(service, num_tokens)
        while any(useful := service.books.to_evict(pages)) and service.evict(useful):
            pass

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        """Say whether the next step of running requests fits; if not, SGLang retracts one and asks again."""
        service = process_state.required_service()
        service.settle()
        is_last = requests is not None and len(requests) <= 1
        if requests is not None:
            service.tally.running(len(requests), service.must_bytes)
        if service.is_over and not is_last:
            return service.tally.refuse()
        pages = self._pages(service, num_tokens)
        if any(service.books.short(pages)):
            service.wait(pages)
            self.evict_to_free_tokens(tree_cache, num_tokens)
        return not any(service.books.short(pages)) or service.tally.refuse()

    def max_new_tokens_for_memory(self, input_tokens: int, max_new_tokens: int, **kwargs: Any) -> int | None:
        """Return as many as fit into the limit; None for a prompt that does not."""
        limit = process_state.required_service().limit_pages(0) * self.page_size
        if input_tokens + 1 > limit:
            return None
        kwargs["token_capacity"] = min(kwargs["token_capacity"], limit)
        answer: int | None = super().max_new_tokens_for_memory(  # type: ignore[misc]
            input_tokens, max_new_tokens, **kwargs
        )
        return answer

    def verify_byte_accounting(self) -> list[str]:
        """Settle the budget of a scheduler that has nothing to do; return what does not add up."""
        return process_state.required_service().idle()

    def _pages(self, service: SchedulerMemory, tokens: int) -> list[int]:
        return [-(-tokens // self.page_size)] * len(service.books.sheets)
