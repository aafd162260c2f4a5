"""What may begin in a step, of two amounts: what this engine could ever have, of which requests are admitted,
and what is here, of which this step's prompts are."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SWAPrefillBudget

if TYPE_CHECKING:
    from sglang_kvcached.scheduler_memory import SchedulerMemory


class _Physical(PrefillBudget if TYPE_CHECKING else object):  # type: ignore[misc]
    """What is added to either of SGLang's budgets.

    SGLang knows one unfinished prompt at a time and asserts it. With stock's budget that one takes all of a
    step, or ends. Here it may get less, or nothing, and memory may come right after: nobody begins behind it.
    """

    def __init__(self, service: SchedulerMemory, allocator: Any, tree_cache: Any, **kwargs: Any) -> None:
        super().__init__(allocator, tree_cache, **kwargs)
        self._service = service
        self._before = self.current_offset  # what decoding requests take of this step
        self._unfinished = False  # the long prompt that goes on does not end in this step
        self._chunk_at: int | None = None  # the offset at which it asks for its chunk

    @property
    def remaining_total(self) -> float:
        """Tokens to promise, for as long as requests run."""
        if not self._service.admits:
            return 0
        return float(self._service.attainable_at_most(0) * self.page_size - self.total_offset)

    @property
    def remaining_current(self) -> int:
        """Tokens to hand out in this step, by eviction too."""
        books = self._service.books
        pages = books.attainable(0) + books.sheets[0].cached_pages
        return int(pages * self.page_size - self.current_offset)

    def has_capacity(self) -> bool:
        """Say whether to look at another request: what it needs now is asked for when it is known."""
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
        self._service.count()
        if self._unfinished:
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
        if not fits or not self._have(self.ceil_paged_tokens(tokens) + self.page_size):
            return self._refuse(total_tokens), None
        return True, limit

    def can_allocate_prefill(self, *, paged_input: int, **rest: Any) -> bool:
        """Say whether a request that ignores its end may begin, or a chunk may have its request's state."""
        self._service.count()
        is_chunk = self.current_offset == self._chunk_at
        may = is_chunk or not self._unfinished
        if may and self._have(paged_input) and super().can_allocate_prefill(paged_input=paged_input, **rest):
            return True
        if is_chunk:
            self._unfinished, self._chunk_at = True, None
        return self._refuse(paged_input)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """Return the tokens with which a long prompt goes on; None: not in this step."""
        tokens = self._chunk_tokens(chunk_limit)
        self._unfinished = tokens is None
        return tokens

    def fit_chunk(self, *, extend_input_len: int, **rest: Any) -> int | None:
        """Return the tokens of a long prompt's next chunk; None: not in this step."""
        limit: int | None = super().fit_chunk(extend_input_len=extend_input_len, **rest)
        self._unfinished = limit is None or limit < extend_input_len
        self._chunk_at = None if limit is None else self.current_offset
        return limit

    def _chunk_tokens(self, chunk_limit: int) -> int | None:
        self._service.count()
        if self._service.is_over and self._service.demand.running:
            return None  # what it took would keep requests from being retracted for long
        wanted = super().available_chunk_tokens(chunk_limit)
        if wanted is not None and not self._have(self.ceil_paged_tokens(wanted) + self.page_size):
            # All sheets take from one budget: what each could have is not what they have together.
            most = range(1, int(wanted) // self.page_size + 1)
            wanted = self.page_size * bisect_left(
                most, True, key=lambda pages: any(self._short((pages + 1) * self.page_size))
            )
        return wanted if wanted is not None and wanted > 0 else None

    def _have(self, tokens: int) -> bool:
        """Say whether so many tokens are here; if they are on their way, wait for them a moment."""
        if not any(self._short(tokens)):
            return True
        self._service.wait(self._pages(tokens))
        return not any(self._short(tokens))

    def _short(self, tokens: int) -> list[int]:
        """Return the pages of each sheet that are missing for so many tokens."""
        return self._service.books.short(self._pages(tokens))

    def _pages(self, tokens: int) -> list[int]:
        """Return the pages that so many tokens take of each sheet beside those of this step, without what
        eviction frees."""
        needed = -(-(tokens + self.current_offset) // self.page_size)
        return [max(0, int(needed) - sheet.cached_pages) for sheet in self._service.books.sheets]

    def _may_begin_alone(self, input_tokens: int) -> bool:
        """Say whether a request may begin though it may never be given all it could ask for: nothing else
        runs, and its prompt fits into the limit."""
        service = self._service
        if service.demand.running or self.current_offset > self._before or not service.admits:
            return False
        return bool(input_tokens < service.limit_pages(0) * self.page_size)

    def _refuse(self, tokens: int) -> bool:
        """Remember what was missing: SGLang admits nobody until a request ends, or this is here."""
        pages = -(-(tokens + int(self.total_offset)) // self.page_size)
        self._service.note_short([pages] + [0] * (len(self._service.books.sheets) - 1))
        return False


class ElasticPrefillBudget(_Physical, PrefillBudget):
    """One pool."""


class ElasticSWAPrefillBudget(_Physical, SWAPrefillBudget):
    """Full attention and sliding window, which take from the same granules of the ledger."""

    @property
    def remaining_swa(self) -> int:
        """Tokens of the sliding window to promise."""
        return int(self._service.attainable_at_most(1) * self.page_size - self.swa_offset)
