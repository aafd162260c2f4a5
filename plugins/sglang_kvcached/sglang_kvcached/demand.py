"""Pages that a scheduler's next steps may take: the same on every rank, and cheap to compute."""

from __future__ import annotations

from itertools import islice
from typing import Any

_MAX_WAITING_READ = 64  # requests of the queue; later requests count like these
_MAX_NEW_TOKENS = 4096  # SGLang's cap for the tokens that it expects of one request


class Demand:
    """Reads a scheduler's queues. Every number is an upper bound: unused memory is given back later."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._page_size = int(scheduler.page_size)
        chunk = scheduler.chunked_prefill_size
        self._step_tokens = int(chunk if chunk and chunk > 0 else scheduler.max_prefill_tokens)

    @property
    def running(self) -> int:
        """Running requests: all that decode, and those whose prompt was computed in the last step."""
        return len(self._decoding) + len(self._joining)

    @property
    def _decoding(self) -> list[Any]:
        batch = self._scheduler.running_batch
        return [] if batch is None else batch.reqs

    @property
    def _joining(self) -> list[Any]:
        """Requests whose prompt was computed in the last step and that do not decode yet."""
        last, decoding = self._scheduler.last_batch, self._decoding
        if last is None or not last.reqs or not last.forward_mode.is_extend():
            return []
        # SGLang appends them to the decoding requests or makes them the decoding ones; last_batch stays.
        return [] if decoding and decoding[-1] is last.reqs[-1] else last.reqs

    @property
    def is_computing(self) -> bool:
        """Say whether a step may be running now, during which memory for the next one can be made.

        SGLang keeps a long prompt that is computed in chunks apart from the running requests.
        """
        return bool(self.running or self._scheduler.chunked_req is not None)

    def growth_pages(self) -> int:
        """Return the pages that running requests may take in the next steps."""
        pages = self.running * self._pages(1 + self._lookahead)
        chunked = self._scheduler.chunked_req
        if chunked is not None:
            tokens = len(chunked.full_untruncated_fill_ids) - chunked.prefix_len
            pages += 1 + self._pages(min(max(0, tokens), self._step_tokens))
        return pages

    def next_pages(self) -> int:
        """Return the growth, and the pages of the waiting requests that the next two steps could begin.

        If nothing runs, counts one step only: the first step then does not wait for the second step's memory,
        which is created while the first computes.
        """
        pages, tokens = self.growth_pages(), 0
        most = (2 if self.is_computing else 1) * self._step_tokens
        for request in islice(self._scheduler.waiting_queue, min(self._free_places, _MAX_WAITING_READ)):
            if tokens >= most:
                break
            length = _prompt_tokens(request)
            pages += 1 + self._pages(length)
            tokens += length
        return pages

    def remaining_pages(self) -> int:
        """Return the pages that all requests may still take until they end, as SGLang estimates it.

        Reads all running requests and the first waiting requests; later waiting requests count like these.
        """
        ratio = float(self._scheduler.new_token_ratio_tracker.current)
        waiting = self._scheduler.waiting_queue
        first_waiting = list(islice(waiting, _MAX_WAITING_READ))
        pages = self.growth_pages()
        pages += sum(self._output_pages(request, ratio) for request in (*self._decoding, *self._joining))
        queued = sum(
            self._pages(_prompt_tokens(request)) + self._output_pages(request, ratio)
            for request in first_waiting
        )
        return pages + (
            queued * min(len(waiting), self._free_places) // len(first_waiting) if first_waiting else 0
        )

    def _output_pages(self, request: Any, ratio: float) -> int:
        sampling = request.sampling_params
        tokens = max(0, min(sampling.max_new_tokens - len(request.output_ids), _MAX_NEW_TOKENS))
        return self._pages(tokens if sampling.ignore_eos else int(tokens * ratio))

    def clear_batch_is_full(self) -> None:
        """Clear the flag with which SGLang remembers that no waiting request fits; it then checks again."""
        self._scheduler.running_batch.batch_is_full = False

    @property
    def _free_places(self) -> int:
        """The number of further requests that SGLang allows to run."""
        return max(0, int(self._scheduler.max_running_requests) - self.running)

    @property
    def _lookahead(self) -> int:
        return int(self._scheduler.server_args.speculative_num_draft_tokens or 0)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _prompt_tokens(request: Any) -> int:
    """Return the tokens of a request's prefill; a retracted request has output tokens as well."""
    return len(request.origin_input_ids) + len(request.output_ids)
