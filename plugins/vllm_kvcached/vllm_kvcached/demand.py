"""How many blocks a scheduler's next steps may need; cheap enough to compute in every step."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_MOST_WAITING_READ = 64  # requests, so that a long queue costs no more than a short one


class Demand:
    """Reads a scheduler's queues. Every number is an upper bound: unused memory is given back later."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._pool = scheduler.kv_cache_manager.block_pool
        groups = scheduler.kv_cache_config.kv_cache_groups
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]
        # Blocks of one request in one step: its next token and lookahead tokens open new ones in each group.
        self._per_running = sum(1 + -(-scheduler.num_lookahead_tokens // size) for size in self._block_sizes)
        self._per_step = self._of_tokens(scheduler.max_num_scheduled_tokens)
        self._prefilling = False
        self.preemptions = 0

    def next_blocks(self) -> int:
        """Return the blocks that running requests, and the next ones to be admitted, may take.

        Counts the waiting requests that two steps could prefill. If nothing runs, counts one step only: the
        first step then does not wait for the second step's memory, which is created while the first computes.
        """
        needed = self.growth_blocks()
        if self._heads():
            steps = 2 if self._scheduler.running else 1
            needed += self._of_waiting(steps * self._scheduler.max_num_scheduled_tokens)
            needed += int(self._manager.watermark_blocks)
        return needed

    def growth_blocks(self) -> int:
        """Return the blocks that running requests alone may take in the next step."""
        return self._of_running() + (self._per_step if self._prefilling else 0)

    def is_short(self) -> bool:
        """Say whether the next step would preempt a request, or schedule less, for lack of free blocks."""
        scheduler = self._scheduler
        needed = self._of_running()
        if len(scheduler.running) < scheduler.max_num_running_reqs:
            needed += self._of_waiting(scheduler.max_num_scheduled_tokens)
        return bool(self._pool.get_num_free_blocks() < needed)

    def request_over_limit(self, limit_blocks: int) -> Request | None:
        """Return the first waiting request that exceeds the limit by itself, or None."""
        return self._over(limit_blocks) if len(self._block_sizes) == 1 else None

    def request_over_free_blocks(self) -> Request | None:
        """Return the first waiting request that exceeds the free blocks, or None; None while requests run."""
        return None if self._scheduler.running else self._over(self._pool.get_num_free_blocks())

    def note_step(self, output: SchedulerOutput) -> None:
        """Count the step's preemptions, and note a prefill: the next step may continue it."""
        decoding = len(self._scheduler.running) * (1 + self._scheduler.num_lookahead_tokens)
        self._prefilling = output.total_num_scheduled_tokens > decoding
        self.preemptions += len(output.preempted_req_ids or ())

    def _heads(self) -> list[Request]:
        """Return the first request of each queue."""
        return [queue.peek_request() for queue in self._queues() if queue]

    def _queues(self) -> tuple[Any, ...]:
        # vLLM 0.30 puts preempted requests aside until their steps in flight have ended.
        return getattr(self._scheduler, "skipped_waiting", ()), self._scheduler.waiting

    def _over(self, most_blocks: int) -> Request | None:
        return next((head for head in self._heads() if self._of_request(head) > most_blocks), None)

    def _of_tokens(self, tokens: int) -> int:
        return sum(-(-tokens // size) for size in self._block_sizes)

    def _of_running(self) -> int:
        """Return the blocks that running requests may open in one step."""
        return int(len(self._scheduler.running) * self._per_running)

    def _of_request(self, request: Request) -> int:
        """Return the blocks that a waiting request needs until its first token, with vLLM's lookahead."""
        scheduler = self._scheduler
        tokens = request.num_tokens + scheduler.num_lookahead_tokens
        return self._of_tokens(min(tokens, scheduler.max_model_len))

    def _of_waiting(self, most_tokens: int) -> int:
        """Return the blocks of the first waiting requests, as many requests as reach `most_tokens` tokens."""
        tokens = blocks = 0
        for request in islice(chain(*self._queues()), _MOST_WAITING_READ):
            blocks += self._of_request(request)
            tokens += request.num_tokens
            if tokens >= most_tokens:
                break
        return blocks
