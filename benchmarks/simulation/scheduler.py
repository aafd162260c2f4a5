"""The requests and the cached blocks of one engine, as vLLM's scheduler and its block pool keep them."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from benchmarks.simulation.traffic import BLOCK_TOKENS, Arrival
from kvcached_core.scheduler.granules import Granules

MAX_RUNNING = 128
STEP_TOKENS = 8192  # most prompt tokens of a step


@dataclass(slots=True)
class Block:
    """One block of KV cache."""

    block_id: int


@dataclass
class Request:
    """A request. Its whole prompt is computed in the step that admits it."""

    arrival: Arrival
    tokens: int = 0
    blocks: list[Block] = field(default_factory=list)

    @property
    def missing_blocks(self) -> int:
        """How many more blocks the request needs for its tokens and the next token."""
        tokens = self.tokens or self.arrival.prompt
        return tokens // BLOCK_TOKENS + 1 - len(self.blocks)


class Cache:
    """An engine's blocks. Blocks that requests put back stay cached; the least recently used goes first."""

    def __init__(self, granules: Granules[Block]) -> None:
        self.granules = granules
        self.evictions = 0
        self._cached: OrderedDict[int, Block] = OrderedDict()

    def take(self, count: int) -> list[Block]:
        """Take `count` blocks, which must be free or cached; cached blocks are taken last."""
        taken = self.granules.take(count)
        evicted = [self._cached.popitem(last=False)[1] for _ in range(count - len(taken))]
        self.granules.hold(evicted)
        self.evictions += len(evicted)
        return taken + evicted

    def put(self, blocks: list[Block]) -> None:
        """Keep a request's full blocks as cache, all but the last, which is not full."""
        self.granules.free(blocks[-1:])
        kept = blocks[-2::-1]  # the end of a prompt is evicted before its beginning
        self.granules.lend(kept)
        self._cached.update((block.block_id, block) for block in kept)

    def evict(self, blocks: list[Block]) -> None:
        """Drop these cached blocks, because their memory is given up."""
        self.evictions += len(blocks)
        for block in blocks:
            del self._cached[block.block_id]


class Queue:
    """An engine's requests, first come, first served. The youngest is preempted first and starts over."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished = self.preemptions = 0
        self.admitted_last = False  # whether the latest step admitted a request

    def demand_blocks(self) -> int:
        """Return the blocks that the next steps may need, computed as in the plugin for vLLM."""
        needed = len(self.running) + (STEP_TOKENS // BLOCK_TOKENS if self.admitted_last else 0)
        return needed + self._of_waiting(2 * STEP_TOKENS)

    def is_short(self) -> bool:
        """Return whether the next step lacks blocks for running or waiting requests."""
        needed = len(self.running)
        needed += self._of_waiting(STEP_TOKENS) if len(self.running) < MAX_RUNNING else 0
        return self.cache.granules.free_blocks < needed

    def true_demand_blocks(self) -> int:
        """Return the blocks, held or not, that all requests need which may run at the same time."""
        waiting = min(len(self.waiting), MAX_RUNNING - len(self.running))
        return (
            1  # the null block
            + sum(len(request.blocks) for request in self.running)
            + sum(self.waiting[at].missing_blocks for at in range(waiting))
        )

    def preempt(self) -> None:
        """Put the youngest request back into the queue; its blocks stay cached."""
        victim = self.running.pop()
        self.cache.put(victim.blocks)
        self.waiting.appendleft(Request(victim.arrival))
        self.preemptions += 1

    def schedule(self, admits: bool) -> int:
        """Give blocks to running requests, then admit waiting ones; return how many run in this step."""
        at = 0
        while at < len(self.running):
            need = self.running[at].missing_blocks
            if need <= self.cache.granules.free_blocks:
                self.running[at].blocks += self.cache.take(need)
                at += 1
            else:
                self.preempt()
                admits = False
        before, budget = len(self.running), STEP_TOKENS
        while admits and self.waiting and len(self.running) < MAX_RUNNING:
            head = self.waiting[0]
            if head.missing_blocks > self.cache.granules.free_blocks or head.arrival.prompt > budget:
                break
            head.blocks += self.cache.take(head.missing_blocks)
            head.tokens, budget = head.arrival.prompt, budget - head.arrival.prompt
            self.running.append(self.waiting.popleft())
        self.admitted_last = len(self.running) > before
        return len(self.running)

    def advance(self) -> None:
        """Give each running request a token, and end requests that are complete."""
        for request in self.running:
            request.tokens += 1
        done = [r for r in self.running if r.tokens >= r.arrival.prompt + r.arrival.answer]
        if done:
            self.running = [r for r in self.running if r.tokens < r.arrival.prompt + r.arrival.answer]
            for request in done:
                self.cache.put(request.blocks)
            self.finished += len(done)

    def _of_waiting(self, most_tokens: int) -> int:
        tokens = blocks = 0
        for request in self.waiting:
            blocks += request.missing_blocks
            tokens += request.arrival.prompt
            if tokens >= most_tokens:
                break
        return blocks
