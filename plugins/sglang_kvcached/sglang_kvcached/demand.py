"""What a scheduler's next steps may take, in pages: the same on every rank, and cheap to ask for."""

from __future__ import annotations

from itertools import islice
from typing import Any

_LOOK_AT_WAITING = 64  # requests, so that a long queue costs no more than a short one
_MOST_NEW_TOKENS = 4096  # as SGLang counts on, of what a request may ask for


class Demand:
    """Reads a scheduler's queues. Bounds from above: what is asked for and not needed is let go again."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._page_size = int(scheduler.page_size)
        chunk = scheduler.chunked_prefill_size
        self._step_tokens = int(chunk if chunk and chunk > 0 else scheduler.max_prefill_tokens)

    @property
    def running(self) -> int:
        """Requests that decode, and those whose prompt was computed in the last step."""
        return len(self._decoding) + len(self._joining)

    @property
    def _decoding(self) -> list[Any]:
        batch = self._scheduler.running_batch
        return [] if batch is None else batch.reqs

    @property
    def _joining(self) -> list[Any]:
        """Requests whose prompt was computed in the last step and that are not among those that decode."""
        last, decoding = self._scheduler.last_batch, self._decoding
        if last is None or not last.reqs or not last.forward_mode.is_extend():
            return []
        # SGLang adds them to the end of those that decode, or makes them these; the batch stays as it is.
        return [] if decoding and decoding[-1] is last.reqs[-1] else last.reqs

    @property
    def is_under_way(self) -> bool:
        """Say whether a step may be computed just now, behind which there is time.

        SGLang sets a long prompt that does not end in it aside from those that run.
        """
        return bool(self.running or self._scheduler.chunked_req is not None)

    def growth(self) -> int:
        """Return what requests that run already may take in the next steps."""
        pages = self.running * self._pages(1 + self._lookahead)
        chunked = self._scheduler.chunked_req
        if chunked is not None:
            tokens = len(chunked.full_untruncated_fill_ids) - chunked.prefix_len
            pages += 1 + self._pages(min(max(0, tokens), self._step_tokens))
        return pages

    def pages(self) -> int:
        """Return that, and what the next requests of the queue take that two steps could begin with.

        One step if nothing runs: making the second's memory would hold up the first one's start, and there is
        time for it while that is computed.
        """
        pages, tokens = self.growth(), 0
        most = (2 if self.is_under_way else 1) * self._step_tokens
        for request in islice(self._scheduler.waiting_queue, min(self._room, _LOOK_AT_WAITING)):
            if tokens >= most:
                break
            length = _prompt_tokens(request)
            pages += 1 + self._pages(length)
            tokens += length
        return pages

    def lasting(self) -> int:
        """Return what all requests may still take until they end, as SGLang estimates it.

        Looks at all that run. Those that wait beyond the first ones are taken to be like these.
        """
        ratio = float(self._scheduler.new_token_ratio_tracker.current)
        waiting = self._scheduler.waiting_queue
        looked_at = list(islice(waiting, _LOOK_AT_WAITING))
        pages = self.growth()
        pages += sum(self._to_generate(request, ratio) for request in (*self._decoding, *self._joining))
        queued = sum(
            self._pages(_prompt_tokens(request)) + self._to_generate(request, ratio) for request in looked_at
        )
        return pages + (queued * min(len(waiting), self._room) // len(looked_at) if looked_at else 0)

    def _to_generate(self, request: Any, ratio: float) -> int:
        sampling = request.sampling_params
        tokens = max(0, min(sampling.max_new_tokens - len(request.output_ids), _MOST_NEW_TOKENS))
        return self._pages(tokens if sampling.ignore_eos else int(tokens * ratio))

    def admit_again(self) -> None:
        """Let SGLang look at its queue again: it had found that nothing more fits."""
        self._scheduler.running_batch.batch_is_full = False

    @property
    def _room(self) -> int:
        """Requests that may run beside those that do."""
        return max(0, int(self._scheduler.max_running_requests) - self.running)

    @property
    def _lookahead(self) -> int:
        return int(self._scheduler.server_args.speculative_num_draft_tokens or 0)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _prompt_tokens(request: Any) -> int:
    """Return what is computed before a request's next answer: one that was retracted has answered before."""
    return len(request.origin_input_ids) + len(request.output_ids)
