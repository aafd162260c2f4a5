"""Decides, between two steps, how many granules an engine uses, asks for and releases.

Each rank counts the granules that it ever created. The scheduler counts those that it ever released. Nobody
else writes either number, so `held = min over ranks(created) - released` is safe to use without a lock: a
worker never frees a handle that the scheduler still counts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvcached_core.errors import InvariantError
from kvcached_core.ledger.scheduler_view import EngineUsage
from kvcached_core.plan import Plan
from kvcached_core.scheduler.accounting import GranuleAccounting
from kvcached_core.scheduler.evictor import Evictor
from kvcached_core.scheduler.floor_grace import FloorGrace
from kvcached_core.scheduler.idle_surplus import IdleSurplus
from kvcached_core.scheduler.plan_writer import PlanWriter

# An idle engine gives back this much per plan: its workers begin while the scheduler evicts the rest.
IDLE_SLICE_GRANULES = 128


class LedgerView(Protocol):
    """The ledger as a scheduler sees it. Every call is cheap and takes no lock."""

    def created(self) -> int:
        """Return the granules ever created: the least over all ranks."""

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold at most now."""

    def target_granules(self) -> int:
        """Return how many granules other engines leave to each rank, 1 or more; 0 if none asks for more."""

    def must_granules(self) -> int:
        """Return the same for another engine's floor, for which requests are preempted if need be."""

    def refused(self) -> bool:
        """Say whether the ledger refused memory that a rank asked for."""

    def publish(self, usage: EngineUsage) -> None:
        """Write how the engine uses its memory; wake the workers if they have to act."""


class Governor:
    """Keeps the budget of an engine: the number of granules that may be mapped.

    Call it on one thread, in this order in each step:

    1. `update` sets the budget. It evicts and releases what the engine must give back, and asks for what the
       next steps lack.
    2. While `waiting`, memory is on its way: sleep briefly, then `refresh` counts what came.
    3. The engine schedules its step within the budget.
    4. `take_plan` returns what the workers must map and unmap for that step.

    An engine without requests calls `update` at `deadline` and when the ledger rings, and sends its plan if
    `plan_gives_back`.
    """

    def __init__(
        self,
        granules: GranuleAccounting,
        ledger: LedgerView,
        forget_blocks: Callable[[Any], None],
        spare_granules: int,
        idle_seconds: float,
        event: Callable[..., None] | None = None,
        cache_seconds: float = 0.0,
        remaining_granules: Callable[[], int] = lambda: 0,
    ) -> None:
        """Create a governor that holds granule 0 alone.

        `spare_granules` are asked for beyond the need while requests run. `idle_seconds` and
        `remaining_granules` are those of `IdleSurplus`; `forget_blocks`, `event` and `cache_seconds` those
        of `Evictor`.
        """
        self.granules = granules
        self.deadline: float | None = None  # when `update` has something to do even without a step
        self.held = 0  # granules that every rank has created and the scheduler has not released
        self.limit = self.target = self.must = 0  # as last read; a target or must of 0: nobody asks
        self.enough = 1  # granules for requests, what they are about to take, and cached blocks
        self.wanted = 1  # `enough` and spare granules
        self.needed = 1  # granules for requests and what they are about to take
        self.released = 0  # since the engine began
        self._ledger = ledger
        self._spare = spare_granules
        self._evictor = Evictor(granules, forget_blocks, event, cache_seconds)
        self._idle_surplus = IdleSurplus(idle_seconds, remaining_granules)
        self._floor_grace = FloorGrace()
        self._plan_writer = PlanWriter(granules.mapped_set)
        self._published: EngineUsage | None = None

    def update(self, now: float, demand_blocks: int, busy: bool, growth_blocks: int = 0) -> None:
        """Set the budget of the next step.

        Only `refresh` changes it until the next call. In this order:

        1. Read the ledger: memory that came, the limit, and what other engines ask for.
        2. Evict and release what is above the limit or asked for, except blocks that requests hold.
        3. Evict cached blocks that are too old.
        4. Work out how many granules the engine needs and wants.
        5. Release what the engine has not needed for `idle_seconds`.
        6. Publish the result in the ledger, which wakes the workers if they have to create or free memory.

        `demand_blocks` is how many blocks the next steps may take beyond the used ones; `growth_blocks` is
        the part of it for requests that run already. `busy` says whether there are requests. `now` is a time
        in seconds that never falls.
        """
        granules = self.granules
        self.limit = max(1, min(self._ledger.granule_limit(), granules.granule_count))
        self.target, self.must = self._ledger.target_granules(), self._ledger.must_granules()
        self.held = self._ledger.created() - self.released
        most = self._most_to_hold(now, growth_blocks)
        slice_most = most if busy else max(most, granules.mapped - IDLE_SLICE_GRANULES)
        self._shrink_to(slice_most)
        next_slice_at = now if slice_most > most else None
        expires_at = self._evictor.expire(now)
        self.enough = self._enough_for(demand_blocks)
        self.wanted = min(self.limit, self.enough + (self._spare if busy else 0))
        self.needed = self._needed_for(demand_blocks)
        self._release_idle(now)
        self._floor_grace.note(now, self.must, self.held)
        times = (
            self._idle_surplus.window_ends_at,
            next_slice_at,
            expires_at,
            self._floor_grace.deadline(now),
        )
        self.deadline = min((at for at in times if at is not None), default=None)
        granules.set_budget(min(self.held, self.limit))
        self._publish()

    def refresh(self) -> None:
        """Count memory that came since `update`, and raise the budget by it."""
        self.held = self._ledger.created() - self.released
        self.granules.set_budget(min(self.held, self.limit))

    @property
    def over_target(self) -> bool:
        """Say whether the engine holds more than other engines leave to it: no request may be admitted."""
        return self._ceiling < self.limit and self._ceiling < self.held

    def must_preempt_to(self, now: float) -> int | None:
        """Return how many granules requests may hold, or None if no request has to be preempted.

        Requests are preempted for another engine's floor only, 0.3 s after that engine asked for it.
        """
        return self.must if self._floor_grace.is_over(now) and self.granules.busy > self.must else None

    @property
    def waiting(self) -> bool:
        """Say whether memory is on its way: the engine has asked for it and the ledger has not refused."""
        return self.enough > self.held and not self.over_target and not self._ledger.refused()

    @property
    def attainable_blocks(self) -> int:
        """Blocks this engine could hold if it asked: up to limit and target; once refused, what it holds."""
        granules = self.held if self._ledger.refused() else self._ceiling
        return max(granules, self.granules.mapped) * self.granules.blocks_per_granule

    def note_cache_dropped(self, released: int) -> None:
        """Note that the workers dropped all granules but granule 0, without a plan.

        `released` is how many granules they count as released since the engine began. Raises InvariantError
        if requests hold blocks in a dropped granule.
        """
        self._evictor.shrink(1)
        if self.granules.mapped > 1:
            raise InvariantError(f"requests hold {self.granules.busy} granules of a cache that was dropped")
        self._plan_writer.drop(released)
        self.released = released
        self.refresh()

    @property
    def has_plan(self) -> bool:
        """Say whether there is a plan to send."""
        return self._plan_writer.has_plan(self.released)

    @property
    def plan_gives_back(self) -> bool:
        """Say whether there is a plan to send with which the workers unmap or free memory."""
        return self._plan_writer.gives_back(self.released)

    def take_plan(self) -> Plan | None:
        """Return the plan for the step just scheduled, or None if nothing changes."""
        self.needed = max(self.needed, min(self.granules.busy, self.wanted))
        self._publish()  # with the blocks that the step took
        return self._plan_writer.write(self.released)

    @property
    def _ceiling(self) -> int:
        """Granules the engine may hold: the limit, or less while others ask. Block 0 always needs one."""
        return max(1, min(self.limit, self.target or self.limit, self.must or self.limit))

    def _most_to_hold(self, now: float, growth_blocks: int) -> int:
        """Return how many granules to keep in this step.

        Running requests keep what they hold and are about to take: without it they would preempt each other
        in the next steps. Once the grace of another engine's floor is over, they do not.
        """
        blocks = self.granules.used_blocks + growth_blocks
        most = min(self.limit, max(self._ceiling, -(-blocks // self.granules.blocks_per_granule)))
        return min(most, self.must) if self.must and self._floor_grace.is_over(now) else most

    def _enough_for(self, demand_blocks: int) -> int:
        not_empty = self.granules.mapped - self.granules.empty
        return max(1, min(self.limit, not_empty + self._granules_for(demand_blocks)))

    def _granules_for(self, demand_blocks: int) -> int:
        """Return how many granules, empty or new, `demand_blocks` more blocks take."""
        missing = max(0, demand_blocks - self.granules.stranded_blocks)
        return -(-missing // self.granules.blocks_per_granule)

    def _needed_for(self, demand_blocks: int) -> int:
        granules = self.granules
        blocks = granules.used_blocks + demand_blocks
        return max(1, min(self.limit, max(granules.busy, -(-blocks // granules.blocks_per_granule))))

    def _release_idle(self, now: float) -> None:
        not_empty = self.granules.mapped - self.granules.empty
        surplus = self.held - max(self.wanted, not_empty)
        idle = self._idle_surplus.granules_to_release(now, surplus, self.held - not_empty)
        if idle:
            self._shrink_to(self.held - idle)  # only empty granules: nothing is evicted

    def _shrink_to(self, most: int) -> None:
        """Release all above `most` granules that no request uses, those that are not mapped first."""
        if self.granules.mapped > most:
            self._evictor.shrink(most)
        surplus = self.held - max(most, self.granules.mapped)
        if surplus > 0:
            self.released += surplus
            self.held -= surplus

    def _publish(self) -> None:
        granules = self.granules
        usage = EngineUsage(
            granules.used_blocks,
            granules.cached_blocks,
            granules.stranded_blocks,
            granules.mapped,
            self.wanted,
            self.needed,
            self.released,
            self.enough,
        )
        if usage != self._published:
            self._published = usage
            self._ledger.publish(usage)

    def check(self) -> None:
        """Raise InvariantError unless mapped <= held (I2) and the granules add up (I9)."""
        self.granules.check()
        if self.granules.mapped > max(1, self.held):
            raise InvariantError(f"{self.granules.mapped} granules are mapped and {self.held} are held")
