"""How much memory an engine uses, asks for and lets go; decided by its scheduler between two steps.

Each rank counts the granules it ever created, the scheduler counts those it ever released, and nobody else
writes either number. So `held = min over ranks(created) - released` can be used without a lock and without a
race: a worker never frees a handle that the scheduler still counts on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kvcached_core.errors import InvariantError
from kvcached_core.ledger.scheduler_view import EngineUsage
from kvcached_core.plan import Plan
from kvcached_core.scheduler.accounting import GranuleAccounting

IDLE_SLICE_GRANULES = 128  # given in one plan by an idle engine: the worker begins while the rest is evicted
FLOOR_GRACE_SECONDS = 0.3  # how long an engine may be above what it must give for a floor before it preempts


class LedgerView(Protocol):
    """What a scheduler sees of the ledger; every call is cheap and takes no lock."""

    def created(self) -> int:
        """Return the granules ever created, the least over all ranks."""

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold at most now."""

    def target_granules(self) -> int:
        """Return how many each rank is asked to hold at most, 1 or more; 0 if it is not asked."""

    def must_granules(self) -> int:
        """Return likewise what is asked for the floor of another: by preemption if need be."""

    def refused(self) -> bool:
        """Say whether a rank has asked for memory and did not get it."""

    def publish(self, usage: EngineUsage) -> None:
        """Write what the engine does; rings the workers if they have to act."""


class Governor:
    """Keeps the budget of an engine's granules. One thread calls it; `update` between steps only.

    `spare_granules` are kept ready ahead of need while requests run; whatever was not needed for
    `idle_seconds` is let go. What was cached and not used for `cache_seconds` is evicted, if that is not 0.
    `evict` is told cached blocks that are about to lose their memory. `event` is called for "evict" with the
    `granules` that had cached blocks and the number of those `blocks`. `lasting` says how many granules,
    empty or new ones, the requests there are may still take until they end: idle as these may be now, they
    are not let go. It is called once in `idle_seconds` at most, and only if there is something to let go.
    """

    def __init__(
        self,
        granules: GranuleAccounting,
        ledger: LedgerView,
        evict: Callable[[Any], None],
        spare_granules: int,
        idle_seconds: float,
        event: Callable[..., None] | None = None,
        cache_seconds: float = 0.0,
        lasting: Callable[[], int] = lambda: 0,
    ) -> None:
        self.granules = granules
        self.deadline: float | None = None  # when to look again, should no step come before
        self.held = 0
        self.limit = self.target = self.must = 0  # as last read; target and must: 0 is not asked
        self.enough = 1  # what requests hold and take, and cache
        self.wanted = 1  # that, and spare
        self.needed = 1  # what requests hold and are about to take
        self.released = 0
        self._ledger = ledger
        self._evict = evict
        self._event = event
        self._spare = spare_granules
        self._idle_seconds = idle_seconds
        self._cache_seconds = cache_seconds
        self._lasting = lasting
        self._decay_at: float | None = None
        self._more_at: float | None = None  # set while an idle engine has more to give
        self._expire_at: float | None = None  # when the oldest of what is cached is too old
        self._preempt_at: float | None = None  # set while more is held than a floor of another leaves
        self._least_surplus = 0
        self._sequence = 0
        self._released_sent = 0
        self._published: EngineUsage | None = None

    def update(self, now: float, demand_blocks: int, busy: bool, growth_blocks: int = 0) -> None:
        """Take note of memory that came, let go what others are to have or was idle, ask for what is missing.

        `demand_blocks` is what the next steps may take beyond what is used, `growth_blocks` the part of it
        that requests take which run already. Only here the budget changes.
        """
        granules = self.granules
        self.limit = max(1, min(self._ledger.granule_limit(), granules.granule_count))
        self.target, self.must = self._ledger.target_granules(), self._ledger.must_granules()
        self.held = self._ledger.created() - self.released
        most = self._most(now, growth_blocks)
        slice_most = most if busy else max(most, granules.mapped - IDLE_SLICE_GRANULES)
        self._give_down_to(slice_most)
        self._more_at = now if slice_most > most else None
        self._expire(now)
        self.enough = self._want(demand_blocks)
        self.wanted = min(self.limit, self.enough + (self._spare if busy else 0))
        self.needed = self._need(demand_blocks)
        self._decay(now)
        self._note_must(now)
        granules.set_budget(min(self.held, self.limit))
        self._publish()

    @property
    def over_target(self) -> bool:
        """Say whether more is held than others leave to this engine: no request is to be admitted."""
        return self._asked < self.limit and self._asked < self.held

    def must_preempt_to(self, now: float) -> int | None:
        """Return the granules that requests may hold for now, once others have waited long enough for more.

        None as long as nobody has to be preempted.
        """
        return self.must if self._is_due(now) and self.granules.busy > self.must else None

    def refresh(self) -> None:
        """Take note of memory that came since `update`."""
        self.held = self._ledger.created() - self.released
        self.granules.set_budget(min(self.held, self.limit))

    @property
    def waiting(self) -> bool:
        """Say whether memory is on its way: it was asked for and nobody has refused it."""
        return self.enough > self.held and not self.over_target and not self._ledger.refused()

    @property
    def attainable_blocks(self) -> int:
        """Blocks this engine could use if it asked: up to limit and target, or what it has once refused."""
        granules = self.held if self._ledger.refused() else self._asked
        return max(granules, self.granules.mapped) * self.granules.blocks_per_granule

    def lost_all(self, released: int) -> None:
        """Take note that the workers gave back all but granule 0, by themselves; `released` so far in all.

        Raises InvariantError if requests hold blocks that went with it.
        """
        with self._evicting() as evict:
            self.granules.shrink(1, evict)
        if self.granules.mapped > 1:
            raise InvariantError(f"requests hold {self.granules.busy} granules of a cache that was dropped")
        self.granules.extent.take_change()  # the workers have carried it out
        self.released = self._released_sent = released
        self.refresh()

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
        self.needed = max(self.needed, min(self.granules.busy, self.wanted))
        self._publish()  # what the step took
        if not self.owes:
            return None
        change = self.granules.extent.take_change()
        plan = Plan(self._sequence, change.unmap, change.map, self.released)
        self._sequence += 1
        self._released_sent = self.released
        return plan

    def _want(self, demand_blocks: int) -> int:
        kept = self.granules.mapped - self.granules.empty
        return max(1, min(self.limit, kept + self._granules_for(demand_blocks)))

    def _granules_for(self, demand_blocks: int) -> int:
        """Return how many granules, empty ones or new ones, so many more blocks take."""
        missing = max(0, demand_blocks - self.granules.stranded_blocks)
        return -(-missing // self.granules.blocks_per_granule)

    def _need(self, demand_blocks: int) -> int:
        granules = self.granules
        blocks = granules.used_blocks + demand_blocks
        return max(1, min(self.limit, max(granules.busy, -(-blocks // granules.blocks_per_granule))))

    @property
    def _asked(self) -> int:
        """Granules to come down to: the limit, or less while others ask for it; block 0 needs one."""
        return max(1, min(self.limit, self.target or self.limit, self.must or self.limit))

    def _most(self, now: float, growth_blocks: int) -> int:
        """Granules to hold at most now: what is asked for, and what running requests grow into.

        Without that they would preempt each other in the next steps. For a floor it is given up in the end.
        """
        blocks = self.granules.used_blocks + growth_blocks
        most = min(self.limit, max(self._asked, -(-blocks // self.granules.blocks_per_granule)))
        return min(most, self.must) if self.must and self._is_due(now) else most

    def _is_due(self, now: float) -> bool:
        return self._preempt_at is not None and now >= self._preempt_at

    def _note_must(self, now: float) -> None:
        """Keep the time since when more is held than a floor of another leaves."""
        if not 0 < self.must < self.held:
            self._preempt_at = None
        elif self._preempt_at is None:
            self._preempt_at = now + FLOOR_GRACE_SECONDS
        # A time to preempt that has passed with nobody to preempt is none to wake up for.
        is_to_come = self._preempt_at is not None and now < self._preempt_at
        preempt_at = self._preempt_at if is_to_come else None
        times = (self._decay_at, self._more_at, self._expire_at, preempt_at)
        self.deadline = min((at for at in times if at is not None), default=None)

    def _decay(self, now: float) -> None:
        """Let go what was surplus throughout the last `idle_seconds`, and will be."""
        kept = self.granules.mapped - self.granules.empty
        surplus = self.held - max(self.wanted, kept)
        if self._decay_at is not None:
            self._least_surplus = min(self._least_surplus, surplus)
            if now < self._decay_at and surplus > 0:
                return
            if now >= self._decay_at and self._least_surplus > 0:
                idle = min(self._least_surplus, self.held - kept - self._lasting())
                if idle > 0:
                    self._give_down_to(self.held - idle)  # it is empty: nothing is evicted
                    surplus -= idle
        self._decay_at = now + self._idle_seconds if surplus > 0 else None
        self._least_surplus = surplus

    def _give_down_to(self, most: int) -> None:
        """Let go of all above `most` granules that no request uses: first what is not mapped."""
        if self.granules.mapped > most:
            with self._evicting() as evict:
                self.granules.shrink(most, evict)
        self._release(self.held - max(most, self.granules.mapped))

    def _expire(self, now: float) -> None:
        """Evict what is too old; its memory is surplus from now on."""
        if self._cache_seconds:
            with self._evicting() as evict:
                self._expire_at = self.granules.expire(now, self._cache_seconds, evict)

    @contextlib.contextmanager
    def _evicting(self) -> Iterator[Callable[[list[Any]], None]]:
        """Yield what is told the cached blocks of each granule that gives them up; tell of it afterwards."""
        evicted: list[int] = []

        def evict(blocks: Any) -> None:
            evicted.append(len(blocks))
            self._evict(blocks)

        yield evict
        if evicted and self._event is not None:
            self._event("evict", granules=len(evicted), blocks=sum(evicted))

    def _release(self, granules: int) -> None:
        if granules > 0:
            self.released += granules
            self.held -= granules

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
