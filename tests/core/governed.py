"""A stand-in for an engine: granules, their governor, a worker's mapped set, and a fake ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvcached_core.ledger import EngineUsage
from kvcached_core.plan import Plan
from kvcached_core.scheduler.governor import Governor
from kvcached_core.scheduler.granules import Granules
from tests.core.test_granules import Block

SIZE, COUNT, SPARE, IDLE_SECONDS = 4, 12, 2, 2.0


@dataclass
class FakeLedger:
    """The ledger as a scheduler sees it, with two ranks: the lower count of created granules is used."""

    ranks: list[int] = field(default_factory=lambda: [1, 1])
    limit: int = COUNT
    target: int = 0
    must: int = 0
    is_refused: bool = False
    told: list[EngineUsage] = field(default_factory=list)

    def created(self) -> int:
        """Return the lower count of the two ranks."""
        return min(self.ranks)

    def granule_limit(self) -> int:
        """Return the limit."""
        return self.limit

    def target_granules(self) -> int:
        """Return the most granules that other engines leave to this one."""
        return self.target

    def must_granules(self) -> int:
        """Return the same for another engine's floor."""
        return self.must

    def refused(self) -> bool:
        """Return the answer that the test has set."""
        return self.is_refused

    def publish(self, usage: EngineUsage) -> None:
        """Keep the usage for the test to look at."""
        self.told.append(usage)

    def grant(self, granules: int = COUNT, rank: int | None = None) -> None:
        """Create granules on the ranks, never more than the engine wants."""
        wanted = self.told[-1].wanted_granules + self.told[-1].released_granules if self.told else 1
        for each in range(len(self.ranks)) if rank is None else (rank,):
            self.ranks[each] = max(self.ranks[each], min(self.ranks[each] + granules, wanted))


class Engine:
    """Granules, their governor, and the granules that its worker has mapped."""

    def __init__(self, spare: int = SPARE, cache_seconds: float = 0.0) -> None:
        self.remaining_granules = 0  # granules that requests may still take
        self.ledger = FakeLedger()
        self.blocks = [Block(index) for index in range(SIZE * COUNT)]
        self.granules = Granules(self.blocks, range(0, SIZE * COUNT, SIZE), SIZE)
        self.events: list[tuple[str, dict[str, int]]] = []
        self.governor = Governor(
            self.granules, self.ledger, self._evict, spare, IDLE_SECONDS, self._note_event, cache_seconds,
            lambda: self.remaining_granules,
        )  # fmt: skip
        self.used: list[Block] = []
        self.cached: list[Block] = []
        self.mapped = {0}
        self.plans: list[Plan] = []

    def _evict(self, blocks: list[Any]) -> None:
        for block in blocks:
            self.cached.remove(block)

    def _note_event(self, kind: str, **data: int) -> None:
        self.events.append((kind, data))

    def take(self, count: int) -> None:
        """Take blocks as an engine does: clean ones first, then evict cached ones."""
        taken = self.granules.take(count)
        evicted, self.cached = self.cached[: count - len(taken)], self.cached[count - len(taken) :]
        self.granules.hold(evicted)
        self.used += taken + evicted
        assert len(taken) + len(evicted) == count

    def put(self, count: int, cached: bool) -> None:
        """Return the blocks that were taken first, as cached or clean."""
        blocks, self.used = self.used[:count], self.used[count:]
        if cached:
            self.granules.lend(blocks)
            self.cached += blocks
        else:
            self.granules.free(blocks)

    def send_plan(self) -> Plan | None:
        """Let the worker carry out a plan; the worker needs a handle for each granule it maps (I5)."""
        plan = self.governor.take_plan()
        if plan is not None:
            assert plan.sequence == len(self.plans)
            assert set(plan.unmap) <= self.mapped and not set(plan.map) & self.mapped
            self.mapped = self.mapped - set(plan.unmap) | set(plan.map)
            assert len(self.mapped) <= max(1, self.ledger.created() - plan.released), "a plan needs a create"
            assert not self.plans or plan.released >= self.plans[-1].released
            self.plans.append(plan)
        assert not self.governor.has_plan and not self.governor.plan_gives_back
        needed = {block.block_id // SIZE for block in [*self.used, *self.cached, self.blocks[0]]}
        assert needed <= self.mapped, "I5: a block in use or cached is mapped"
        return plan


def serving(blocks: int) -> Engine:
    """Return an engine that holds this many blocks and was granted all that it wanted."""
    engine = Engine()
    engine.governor.update(0.0, blocks, busy=True)
    engine.ledger.grant()
    engine.governor.update(0.0, blocks, busy=True)
    engine.take(blocks)
    engine.send_plan()
    return engine
