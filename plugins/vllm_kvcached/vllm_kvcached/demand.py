"""What a scheduler's next steps may need, in blocks: cheap to ask for in every step."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_LOOK_AT_WAITING = 64  # requests, so that a long queue costs no more than a short one


class Demand:
    """Reads a scheduler's queues. Bounds from above: what is asked for and not needed is let go again."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._pool = scheduler.kv_cache_manager.block_pool
        groups = scheduler.kv_cache_config.kv_cache_groups
        self._block_sizes = [group.kv_cache_spec.block_size for group in groups]
        # One request in one step: the block that its next tokens open, in each group.
        self._per_running = sum(1 + -(-scheduler.num_lookahead_tokens // size) for size in self._block_sizes)
        self._per_step = self._of_tokens(scheduler.max_num_scheduled_tokens)
        self._prefilling = False
        self.preemptions = 0

    def next_blocks(self) -> int:
        """Return what running requests and the next ones to be admitted may take beyond what is used.

        Those that two steps could prefill; one step if nothing runs: making the second's memory would hold up
        the first one's start, and there is time for it while that is computed.
        """
        needed = self.growth_blocks()
        if self._heads():
            steps = 2 if self._scheduler.running else 1
            needed += self._of_waiting(steps * self._scheduler.max_num_scheduled_tokens)
            needed += int(self._manager.watermark_blocks)
        return needed

    def growth_blocks(self) -> int:
        """Return what running requests alone may take beyond what is used."""
        return self._of_running() + (self._per_step if self._prefilling else 0)

    def is_short(self) -> bool:
        """Say whether the next step would preempt, or be a smaller one than it could, for lack of blocks."""
        scheduler = self._scheduler
        needed = self._of_running()
        if len(scheduler.running) < scheduler.max_num_running_reqs:
            needed += self._of_waiting(scheduler.max_num_scheduled_tokens)
        return bool(self._pool.get_num_free_blocks() < needed)

    def request_over_limit(self, limit_blocks: int) -> Request | None:
        """Return the next request to be admitted if it alone is over the limit."""
        return self._over(limit_blocks) if len(self._block_sizes) == 1 else None

    def request_over_free_blocks(self) -> Request | None:
        """Return the next request if nothing runs and it does not fit into all that is free."""
        return None if self._scheduler.running else self._over(self._pool.get_num_free_blocks())

    def note_step(self, output: SchedulerOutput) -> None:
        """Remember of a step what the next one is likely to do."""
        decoding = len(self._scheduler.running) * (1 + self._scheduler.num_lookahead_tokens)
        self._prefilling = output.total_num_scheduled_tokens > decoding
        self.preemptions += len(output.preempted_req_ids or ())

    def _heads(self) -> list[Request]:
        """Return the requests to be admitted next, of each queue one."""
        return [queue.peek_request() for queue in self._queues() if queue]

    def _queues(self) -> tuple[Any, ...]:
        # vLLM 0.30 puts preempted requests aside until what they have in flight has come.
        return getattr(self._scheduler, "skipped_waiting", ()), self._scheduler.waiting

    def _over(self, most_blocks: int) -> Request | None:
        return next((head for head in self._heads() if self._of_request(head) > most_blocks), None)

    def _of_tokens(self, tokens: int) -> int:
        return sum(-(-tokens // size) for size in self._block_sizes)

    def _of_running(self) -> int:
        """Return the blocks that running requests may open in one step."""
        return int(len(self._scheduler.running) * self._per_running)

    def _of_request(self, request: Request) -> int:
        """Return the blocks that a waiting request needs until its first answer, with vLLM's lookahead."""
        scheduler = self._scheduler
        tokens = request.num_tokens + scheduler.num_lookahead_tokens
        return self._of_tokens(min(tokens, scheduler.max_model_len))

    def _of_waiting(self, most_tokens: int) -> int:
        """Return the blocks of the head of the queue, and of those behind it within so many tokens."""
        tokens = blocks = 0
        for request in islice(chain(*self._queues()), _LOOK_AT_WAITING):
            blocks += self._of_request(request)
            tokens += request.num_tokens
            if tokens >= most_tokens:
                break
        return blocks
