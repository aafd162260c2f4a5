"""How much memory an engine uses, asks for and lets go; decided by its scheduler between two steps.

Each rank counts the granules it ever created, the scheduler counts those it ever released, and nobody else
writes either number. So `held = min over ranks(created) - released` can be used without a lock and without a
race: a worker never frees a handle that the scheduler still counts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from kvcached_core.errors import InvariantError
from kvcached_core.granules import Granules
from kvcached_core.plan import Plan


class Usage(NamedTuple):
    """What an engine does with its memory, in blocks and granules; the ledger shows it to everybody."""

    used_blocks: int
    cached_blocks: int
    stranded_blocks: int
    mapped_granules: int
    wanted_granules: int
    released_granules: int


class LedgerView(Protocol):
    """What a scheduler sees of the ledger; every call is cheap and takes no lock."""

    def created(self) -> int:
        """Return the granules ever created, the least over all ranks."""

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold at most now."""

    def refused(self) -> bool:
        """Say whether a rank has asked for memory and did not get it."""

    def publish(self, usage: Usage) -> None:
        """Write what the engine does; rings the workers if they have to act."""


class Governor:
    """Keeps the budget of an engine's granules. One thread calls it; `update` between steps only.

    `spare_granules` are kept ready ahead of need while requests run; whatever was not needed for
    `idle_seconds` is let go. `evict` is told cached blocks that are about to lose their memory.
    """

    def __init__(
        self,
        granules: Granules[Any],
        ledger: LedgerView,
        evict: Callable[[list[Any]], None],
        spare_granules: int,
        idle_seconds: float,
    ) -> None:
        self.granules = granules
        self.deadline: float | None = None  # when to look again, should no step come before
        self.held = 0
        self.limit = 0
        self.wanted = 1
        self.released = 0
        self._ledger = ledger
        self._evict = evict
        self._spare = spare_granules
        self._idle_seconds = idle_seconds
        self._least_surplus = 0
        self._sequence = 0
        self._released_sent = 0
        self._published: Usage | None = None

    def update(self, now: float, demand_blocks: int, busy: bool) -> None:
        """Take note of memory that came, let go what is over the limit or was idle, ask for what is missing.

        `demand_blocks` is what the next steps may take beyond what is used. Only here the budget changes.
        """
        granules = self.granules
        self.limit = max(1, min(self._ledger.granule_limit(), granules.granule_count))
        self.held = self._ledger.created() - self.released
        if granules.mapped > self.limit:
            granules.shrink(self.limit, self._evict)
        self._release(self.held - max(self.limit, granules.mapped))
        self.wanted = self._want(demand_blocks, busy)
        self._decay(now)
        granules.set_budget(min(self.held, self.limit))
        self._publish()

    def refresh(self) -> bool:
        """Take note of memory that came since `update`; say whether all that is wanted is here."""
        self.held = self._ledger.created() - self.released
        self.granules.set_budget(min(self.held, self.limit))
        return self.held >= self.wanted

    @property
    def waiting(self) -> bool:
        """Say whether memory is on its way: it was asked for and nobody has refused it."""
        return self.wanted > self.held and not self._ledger.refused()

    @property
    def attainable_blocks(self) -> int:
        """Blocks this engine could use if it asked: up to its limit, or what it has once it was refused."""
        granules = self.held if self._ledger.refused() else self.limit
        return max(granules, self.granules.mapped) * self.granules.blocks_per_granule

    @property
    def owes(self) -> bool:
        """Say whether a plan waits to be sent."""
        return self.granules.extent.changed or self.released != self._released_sent

    @property
    def owes_memory(self) -> bool:
        """Say whether a plan waits to be sent that gives something back."""
        return self.granules.extent.gives_back or self.released != self._released_sent

    def take_plan(self) -> Plan | None:
        """Return the plan for the step just scheduled, or None if nothing changes."""
        self._publish()  # what the step took
        if not self.owes:
            return None
        change = self.granules.extent.take_change()
        plan = Plan(self._sequence, change.unmap, change.map, self.released)
        self._sequence += 1
        self._released_sent = self.released
        return plan

    def _want(self, demand_blocks: int, busy: bool) -> int:
        granules = self.granules
        kept = granules.mapped - granules.empty
        missing = max(0, demand_blocks - granules.stranded_blocks)
        wanted = kept + -(-missing // granules.blocks_per_granule) + (self._spare if busy else 0)
        return max(1, min(self.limit, wanted))

    def _decay(self, now: float) -> None:
        """Let go what was surplus throughout the last `idle_seconds`."""
        surplus = self.held - max(self.wanted, self.granules.mapped - self.granules.empty)
        if self.deadline is not None:
            self._least_surplus = min(self._least_surplus, surplus)
            if now < self.deadline and surplus > 0:
                return
            if now >= self.deadline and self._least_surplus > 0:
                self._let_go(self._least_surplus)
                surplus -= self._least_surplus
        self.deadline = now + self._idle_seconds if surplus > 0 else None
        self._least_surplus = surplus

    def _let_go(self, granules: int) -> None:
        unmapped = self.held - self.granules.mapped
        # Surplus beyond what is unmapped is empty, so nothing is evicted here.
        self.granules.shrink(self.granules.mapped - max(0, granules - unmapped), self._evict)
        self._release(granules)

    def _release(self, granules: int) -> None:
        if granules > 0:
            self.released += granules
            self.held -= granules

    def _publish(self) -> None:
        granules = self.granules
        usage = Usage(
            granules.used_blocks,
            granules.cached_blocks,
            granules.stranded_blocks,
            granules.mapped,
            self.wanted,
            self.released,
        )
        if usage != self._published:
            self._published = usage
            self._ledger.publish(usage)

    def check(self) -> None:
        """Raise InvariantError unless mapped <= held (I2) and the granules add up (I9)."""
        self.granules.check()
        if self.granules.mapped > max(1, self.held):
            raise InvariantError(f"{self.granules.mapped} granules are mapped and {self.held} are held")
