"""Another thread changes the budget as fast as it can while the engine's thread schedules."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from devkit.report import record
from kvcached_core.ledger import EngineUsage
from kvcached_core.scheduler import floor_grace
from kvcached_core.scheduler.governor import Governor
from tests.vllm.pools import SIZE, cache, elastic_pool, granules_of, hits

pytestmark = pytest.mark.alone

GRANULES = 64
STEPS = 4000
CHANGES_A_SECOND = 10_000


class LedgerUnderFire:
    """A ledger that changes limit, targets and grants between any two reads. Grants only rise."""

    def __init__(self) -> None:
        self.limit = GRANULES
        self.target = self.must = 0
        self.made = 1
        self.demand = False
        self.usage: EngineUsage | None = None
        self.changes = 0
        self._end = False
        self._thread = threading.Thread(target=self._fire, daemon=True)

    def created(self) -> int:
        """Return the granules ever created."""
        return self.made

    def granule_limit(self) -> int:
        """Return the current limit."""
        return self.limit

    def target_granules(self) -> int:
        """Return the current target, which other engines set."""
        return self.target

    def must_granules(self) -> int:
        """Return the current target for another engine's floor."""
        return self.must

    def refused(self) -> bool:
        """Return a random answer."""
        return self.demand

    def publish(self, usage: EngineUsage) -> None:
        """Note the demand, up to which the thread grants."""
        self.usage = usage

    @contextmanager
    def firing(self) -> Iterator[None]:
        """Run the thread, and make Python switch threads a thousand times as often as usual."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(5e-6)
        self._thread.start()
        try:
            yield
        finally:
            self._end = True
            self._thread.join()
            sys.setswitchinterval(interval)

    def _fire(self) -> None:
        chance = random.Random(1)
        while not self._end:
            self.limit = chance.randrange(GRANULES + 8)
            self.demand = chance.random() < 0.2
            self.target, self.must = (max(0, chance.randrange(-GRANULES, GRANULES)) for _ in "tm")
            usage = self.usage
            if usage is not None:
                most = usage.wanted_granules + usage.released_granules
                self.made = max(self.made, min(self.made + chance.randrange(4), most))
            self.changes += 1


class Scheduler:
    """Makes the calls to a block pool that vLLM's scheduler makes in a step."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.chance = random.Random(2)
        self.running: list[list[Any]] = []
        self.served = self.hits = self.preempted = 0

    def step(self) -> None:
        """Give each running request a block, end some, admit some; preempt if there is no room."""
        for request in list(self.running):
            self._grow(request)
        for _ in range(self.chance.randrange(4)):
            if self.running:
                self.pool.free_blocks(reversed(self.running.pop(self.chance.randrange(len(self.running)))))
                self.served += 1
        while len(self.running) < 24 and self._admit():
            pass

    def _grow(self, request: list[Any]) -> None:
        while request in self.running:
            if self.pool.get_num_free_blocks() >= 1:  # still true when the block is taken:
                request += self.pool.get_new_blocks(1)
                return
            self.preempt()

    def preempt(self) -> None:
        """Preempt the latest request."""
        self.pool.free_blocks(reversed(self.running.pop()))
        self.preempted += 1

    def _admit(self) -> bool:
        first, length = self.chance.randrange(200), self.chance.randrange(1, 20)
        contents = range(first, first + length)
        found = hits(self.pool, contents)
        new = length - len(found) + 1
        if sum(block.ref_cnt == 0 for block in found) + new > self.pool.get_num_free_blocks():
            return False
        self.pool.touch(found)
        blocks = self.pool.get_new_blocks(new)
        cache(self.pool, blocks[:-1], contents[len(found) :])
        self.running.append([*found, *blocks])
        self.hits += len(found)
        return True


def test_no_step_dies_whenever_the_budget_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        floor_grace, "FLOOR_GRACE_SECONDS", 0.0
    )  # targets change faster than the grace period ends
    for_floors = 0
    pool, ledger = elastic_pool(GRANULES, budget=1), LedgerUnderFire()
    queue, granules = pool.free_block_queue, granules_of(pool)
    governor = Governor(granules, ledger, queue.evict, spare_granules=2, idle_seconds=0.001)
    scheduler, mapped = Scheduler(pool), {0}
    began = time.monotonic()
    with ledger.firing():
        for step in range(STEPS):
            governor.update(time.monotonic(), demand_blocks=(step * 37) % 160, busy=step % 5 > 0)
            while governor.must_preempt_to(time.monotonic()) is not None:
                scheduler.preempt()
                for_floors += 1
            queue.settle()
            if step % 3 == 0:
                governor.refresh()
                queue.settle()
            scheduler.step()
            plan = governor.take_plan()
            if plan is not None:
                mapped = mapped - set(plan.unmap) | set(plan.map)
                assert len(mapped) <= ledger.made - plan.released, "I5: a plan needs a create"
            assert queue.num_free_blocks >= 0
            queue.check()
            governor.check()
            pool.take_events()
        seconds = time.monotonic() - began
    record("fire.steps", STEPS)
    record("fire.changes", ledger.changes)
    assert ledger.changes > CHANGES_A_SECOND * seconds
    assert min(scheduler.served, scheduler.hits, scheduler.preempted, for_floors, governor.released) > 100
    for request in scheduler.running:
        pool.free_blocks(reversed(request))
    assert (
        granules.used_blocks == 1
        and granules.mapped * SIZE == granules.clean_blocks + granules.cached_blocks + 1
    )
