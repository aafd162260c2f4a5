"""What a scheduler's next steps may take, in pages: the same on every rank, and cheap to ask for."""

from __future__ import annotations

from itertools import islice
from typing import Any

_LOOK_AT_WAITING = 64  # requests, so that a long queue costs no more than a short one


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
        running, last = self._scheduler.running_batch, self._scheduler.last_batch
        count = 0 if running is None else len(running.reqs)
        if last is not None and last is not running and last.forward_mode.is_extend():
            count += len(last.reqs)
        return count

    @property
    def is_busy(self) -> bool:
        """Say whether there are requests."""
        scheduler = self._scheduler
        return bool(self.running or scheduler.waiting_queue or scheduler.chunked_req is not None)

    def growth(self) -> int:
        """Return what requests that run already may take in the next steps."""
        pages = self.running * self._pages(1 + self._lookahead)
        chunked = self._scheduler.chunked_req
        if chunked is not None:
            tokens = len(chunked.full_untruncated_fill_ids) - chunked.prefix_len
            pages += 1 + self._pages(min(max(0, tokens), self._step_tokens))
        return pages

    def pages(self) -> int:
        """Return that, and what the next requests of the queue take that two steps could begin with."""
        pages, tokens = self.growth(), 0
        room = int(self._scheduler.max_running_requests) - self.running
        for request in islice(self._scheduler.waiting_queue, min(max(0, room), _LOOK_AT_WAITING)):
            if tokens >= 2 * self._step_tokens:
                break
            length = len(request.origin_input_ids) + len(request.output_ids)
            pages += 1 + self._pages(length)
            tokens += length
        return pages

    def admit_again(self) -> None:
        """Let SGLang look at its queue again: it had found that nothing more fits."""
        self._scheduler.running_batch.batch_is_full = False

    @property
    def _lookahead(self) -> int:
        return int(self._scheduler.server_args.speculative_num_draft_tokens or 0)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)
