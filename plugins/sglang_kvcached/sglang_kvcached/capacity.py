"""The scheduler's questions to an allocator: what may begin, what may go on. Here the budget speaks."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_kvcached import memory
from sglang_kvcached.service import Service


class Capacity:
    """Answers for an allocator of one sheet, number `_at`."""

    page_size: int
    _at: int

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> Any:
        """Settle the budget, and return what may begin in this step."""
        service = memory.service()
        if service is None:
            return super().create_prefill_budget(  # type: ignore[misc]
                tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens
            )
        service.settle()
        return ElasticPrefillBudget(service, self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> None:
        """Evict until so many tokens can be had, or nothing more can be evicted."""
        service = memory.service()
        if service is None or tree_cache is None or not tree_cache.supports_prefix_sharing():
            return
        short = num_tokens - self._attainable(service)
        if short > 0:
            # Not evict_for_alloc(): what it aims at is the available size, which is no shortage of memory.
            tree_cache.evict(EvictParams(num_tokens=short))

    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        """Say whether the next step of running requests fits; if not, SGLang retracts one and asks again."""
        service = memory.service()
        if service is None:
            return bool(super().check_decode_capacity(  # type: ignore[misc]
                num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
            ))  # fmt: skip
        service.settle()
        is_last = requests is not None and len(requests) <= 1
        if requests is not None:
            service.tally.running(len(requests))
        if service.is_over and not is_last:
            return service.tally.refuse()
        if num_tokens > self._attainable(service):
            service.wait(self._at, -(-num_tokens // self.page_size))
            self.evict_to_free_tokens(tree_cache, num_tokens)
        return num_tokens <= self._attainable(service) or service.tally.refuse()

    def max_new_tokens_for_memory(self, input_tokens: int, max_new_tokens: int, **kwargs: Any) -> int | None:
        """Return as many as fit into the limit; None for a prompt that does not."""
        if (service := memory.service()) is not None:
            limit = service.limit_pages(self._at) * self.page_size
            if input_tokens + 1 > limit:
                return None
            kwargs["token_capacity"] = min(kwargs["token_capacity"], limit)
        answer: int | None = super().max_new_tokens_for_memory(  # type: ignore[misc]
            input_tokens, max_new_tokens, **kwargs
        )
        return answer

    def verify_byte_accounting(self) -> list[str]:
        """Settle the budget of a scheduler that has nothing to do; return what does not add up."""
        service = memory.service()
        return [] if service is None else service.idle()

    def _attainable(self, service: Service) -> int:
        """Return the tokens that may be taken now."""
        return service.books.attainable(self._at) * self.page_size


class ElasticPrefillBudget(PrefillBudget):
    """Two amounts: what this engine could ever have, of which requests are admitted, and what is here, of
    which this step's prompts are."""

    def __init__(self, service: Service, allocator: Any, tree_cache: Any, **kwargs: Any) -> None:
        super().__init__(allocator, tree_cache, **kwargs)
        self._service = service
        self._at = allocator._at
        self._before = self.current_offset  # what decoding requests take of this step

    @property
    def _evictable(self) -> int:
        tree = self.tree_cache
        return int(tree.full_evictable_size() if tree.supports_mamba() else tree.evictable_size())

    @property
    def remaining_total(self) -> float:
        """Tokens to promise, for as long as requests run."""
        if not self._service.admits:
            return 0
        most = self._service.attainable_at_most(self._at) * self.page_size
        return most + self._evictable - self.total_offset

    @property
    def remaining_current(self) -> int:
        """Tokens to hand out in this step."""
        here = self._service.books.attainable(self._at) * self.page_size
        return here + self._evictable - self.current_offset

    def has_capacity(self) -> bool:
        """Say whether to look at another request: what it needs now is asked for when it is known."""
        return self.remaining_total > 0

    def check_prefill(self, *, extend_input_len: int, total_tokens: int, input_tokens: int,
                      chunk_limit: int | None, **_: Any) -> tuple[bool, int | None]:  # fmt: skip
        """Say whether a request may begin, and with how large a chunk."""
        if total_tokens >= self.remaining_total and not self._may_begin_alone(input_tokens):
            return self._short(total_tokens), None
        tokens = extend_input_len if chunk_limit is None else min(extend_input_len, chunk_limit)
        if not self._have(self.ceil_paged_tokens(tokens) + self.page_size):
            return self._short(total_tokens), None
        return True, chunk_limit

    def can_allocate_prefill(self, *, paged_input: int, **_: Any) -> bool:
        """Say whether a request that ignores its end may begin."""
        return paged_input <= self.remaining_total and self._have(paged_input)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """Return the tokens with which a long prompt goes on; None: not in this step."""
        total = int(self.remaining_total)
        wanted = min(chunk_limit, total) if total > 0 else chunk_limit
        if not self._have(self.ceil_paged_tokens(wanted) + self.page_size):
            here = (self.remaining_current - self.page_size) // self.page_size * self.page_size
            wanted = min(wanted, here)
        return wanted if wanted > 0 else None

    def _have(self, tokens: int) -> bool:
        """Say whether so many tokens are here; if they are on their way, wait for them a moment."""
        if tokens > self.remaining_current:
            short = tokens + self.current_offset - self._evictable
            self._service.wait(self._at, -(-short // self.page_size))
        return tokens <= self.remaining_current

    def _may_begin_alone(self, input_tokens: int) -> bool:
        """Say whether a request may begin though it may never be given all it could ask for: nothing else
        runs, and its prompt fits into the limit."""
        if self._service.demand.running or self.current_offset > self._before or not self._service.admits:
            return False
        return input_tokens < self._service.limit_pages(self._at) * self.page_size

    def _short(self, tokens: int) -> bool:
        """Remember what was missing: SGLang admits nobody until a request ends, or this is here."""
        self._service.note_short(self._at, -(-(tokens + int(self.total_offset)) // self.page_size))
        return False
