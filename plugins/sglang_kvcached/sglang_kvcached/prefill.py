"""Decides which requests may begin in a step, and with how large a chunk.

Requests are admitted against the memory this engine could get; the prompts of this step are scheduled against
the memory it has now.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SWAPrefillBudget

if TYPE_CHECKING:
    from sglang_kvcached.scheduler_memory import SchedulerMemory


class _BudgetedPrefill(PrefillBudget if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixin for both prefill budgets of SGLang.

    SGLang asserts that at most one prompt is unfinished. In stock such a prompt takes the rest of the step or
    ends in it. Here the prompt may get less or nothing, and memory may arrive right after that. So no request
    begins after an unfinished prompt.
    """

    def __init__(self, memory: SchedulerMemory, allocator: Any, tree_cache: Any, **kwargs: Any) -> None:
        super().__init__(allocator, tree_cache, **kwargs)
        self._memory = memory
        self._decode_offset = self.current_offset  # tokens that decoding requests take of this step
        self._has_unfinished = False  # whether a prompt computed in chunks does not end in this step
        self._chunk_offset: int | None = None  # the offset at which that prompt asks for its chunk

    @property
    def remaining_total(self) -> float:
        """Tokens that may still be promised to requests for their whole runtime."""
        if not self._memory.may_admit:
            return 0
        return float(self._memory.attainable_pages(0) * self.page_size - self.total_offset)

    @property
    def remaining_current(self) -> int:
        """Tokens that may still be taken in this step, eviction included."""
        accounting = self._memory.accounting
        pages = accounting.available_pages(0) + accounting.page_pools[0].cached_pages
        return int(pages * self.page_size - self.current_offset)

    def has_capacity(self) -> bool:
        """Say whether SGLang should look at another request. Each request's memory is checked separately."""
        return self.remaining_total > 0

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        total_tokens: int,
        input_tokens: int,
        chunk_limit: int | None,
        **rest: Any,
    ) -> tuple[bool, int | None]:
        """Say whether a request may begin, and with how large a chunk."""
        self._memory.prefix_cache.count()
        if self._has_unfinished:
            return self._refuse(total_tokens), None
        fits, limit = super().check_prefill(
            extend_input_len=extend_input_len,
            total_tokens=total_tokens,
            input_tokens=input_tokens,
            chunk_limit=chunk_limit,
            **rest,
        )
        if not fits and self._may_begin_alone(input_tokens):
            fits, limit = True, chunk_limit
        tokens = extend_input_len if limit is None else min(extend_input_len, limit)
        if not fits or not self._await_memory(self.ceil_paged_tokens(tokens) + self.page_size):
            return self._refuse(total_tokens), None
        return True, limit

    def can_allocate_prefill(self, *, paged_input: int, **rest: Any) -> bool:
        """Say whether a request with `ignore_eos` may begin, or a chunk may take its request's state."""
        self._memory.prefix_cache.count()
        is_chunk = self.current_offset == self._chunk_offset
        may_begin = is_chunk or not self._has_unfinished
        if (
            may_begin
            and self._await_memory(paged_input)
            and super().can_allocate_prefill(paged_input=paged_input, **rest)
        ):
            return True
        if is_chunk:
            self._has_unfinished, self._chunk_offset = True, None
        return self._refuse(paged_input)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """Return the tokens of a long prompt for this step; None if it has to wait."""
        tokens = self._chunk_tokens(chunk_limit)
        self._has_unfinished = tokens is None
        return tokens

    def fit_chunk(self, *, extend_input_len: int, **rest: Any) -> int | None:
        """Return the tokens of a long prompt's next chunk; None if it has to wait."""
        limit: int | None = super().fit_chunk(extend_input_len=extend_input_len, **rest)
        self._has_unfinished = limit is None or limit < extend_input_len
        self._chunk_offset = None if limit is None else self.current_offset
        return limit

    def _chunk_tokens(self, chunk_limit: int) -> int | None:
        self._memory.prefix_cache.count()
        if self._memory.must_retract and self._memory.demand.running:
            return None  # retraction is freeing memory, which a chunk must not take
        wanted = super().available_chunk_tokens(chunk_limit)
        if wanted is not None and not self._await_memory(self.ceil_paged_tokens(wanted) + self.page_size):
            # All page pools share one budget, so together they may have fewer pages than each alone.
            most = range(1, int(wanted) // self.page_size + 1)
            wanted = self.page_size * bisect_left(
                most, True, key=lambda pages: any(self._missing_pages((pages + 1) * self.page_size))
            )
        return wanted if wanted is not None and wanted > 0 else None

    def _await_memory(self, tokens: int) -> bool:
        """Say whether memory for this many tokens is available; wait briefly if it is on its way."""
        if not any(self._missing_pages(tokens)):
            return True
        self._memory.wait_for_pages(self._pages(tokens))
        return not any(self._missing_pages(tokens))

    def _missing_pages(self, tokens: int) -> list[int]:
        """Return the pages of each pool that are missing for this many tokens."""
        return self._memory.accounting.missing_pages(self._pages(tokens))

    def _pages(self, tokens: int) -> list[int]:
        """Return the pages of each pool that this step and `tokens` more tokens take, less cached pages."""
        needed = -(-(tokens + self.current_offset) // self.page_size)
        return [
            max(0, int(needed) - page_pool.cached_pages) for page_pool in self._memory.accounting.page_pools
        ]

    def _may_begin_alone(self, input_tokens: int) -> bool:
        """Say whether a request that might outgrow the limit may begin: alone, if its prompt fits."""
        memory = self._memory
        if memory.demand.running or self.current_offset > self._decode_offset or not memory.may_admit:
            return False
        return bool(input_tokens < memory.limit_pages(0) * self.page_size)

    def _refuse(self, tokens: int) -> bool:
        """Note the missing pages. SGLang looks again when a request ends or these pages are attainable."""
        pages = -(-(tokens + int(self.total_offset)) // self.page_size)
        self._memory.note_refused([pages] + [0] * (len(self._memory.accounting.page_pools) - 1))
        return False


class ElasticPrefillBudget(_BudgetedPrefill, PrefillBudget):
    """The budget of a model with one pool."""


class ElasticSWAPrefillBudget(_BudgetedPrefill, SWAPrefillBudget):
    """The budget of a model with full attention and sliding windows: two pools share ledger granules."""

    @property
    def remaining_swa(self) -> int:
        """Tokens of the sliding window's pool that may still be promised."""
        return int(self._memory.attainable_pages(1) * self.page_size - self.swa_offset)
