"""What all ranks of an engine go by: rank 0 reads the ledger and tells the others.

Every rank decides for itself, from the same numbers: so ranks must hear them at the same calls, never by
their own clocks. Also the time is rank 0's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from kvcached_core.scheduler.governor import LedgerView, Usage

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PAUSE_SECONDS = 0.0005
HEAR_SECONDS = 0.01  # how often ranks meet for news, about
MOST_BUSY_CALLS, MOST_IDLE_CALLS = 4, 256  # calls that may pass without news; busy ones are slow


class LedgerReading(NamedTuple):
    """What rank 0 read in the ledger, at its time `now_us`; the next news are due after `calls` calls."""

    now_us: int
    created: int
    limit: int
    target: int
    must: int
    refused: int
    calls: int


class RankGroup(Protocol):
    """The ranks that decide alike."""

    is_alone: bool

    def share(self, word: LedgerReading | None) -> LedgerReading:
        """Return rank 0's word on every rank; the others bring none."""


class SingleRank:
    """One rank."""

    is_alone = True

    def share(self, word: LedgerReading | None) -> LedgerReading:
        """Return it."""
        assert word is not None
        return word


class DistributedRanks:
    """Several ranks with a group for tensors of the host, whose first one is rank 0."""

    is_alone = False

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._source = torch.distributed.get_global_rank(group, 0)

    def meet(self) -> None:
        """Return once every rank is here."""
        torch.distributed.barrier(self._group)

    def share(self, word: LedgerReading | None) -> LedgerReading:
        """Broadcast it; every rank has to be here."""
        numbers = torch.tensor(word or [0] * len(LedgerReading._fields), dtype=torch.int64)
        torch.distributed.broadcast(numbers, self._source, group=self._group)
        return LedgerReading(*numbers.tolist())


class RankSync:
    """The ledger as it was last heard of, the same on every rank: a governor's view of it."""

    def __init__(
        self,
        ledger: LedgerView | None,
        circle: RankGroup,
        always: bool,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`ledger` is None but on rank 0. `always`: there is news at each idle call, as these are rare."""
        self._ledger = ledger
        self._circle = circle
        self.is_alone = circle.is_alone
        self._always = always or circle.is_alone
        self._clock = clock
        self._sleep = sleep
        self._calls = self._left = 1
        self._was_idle = True
        self._waited_seconds = 0.0  # since the last call
        self._heard_at = clock()
        self.word = self._hear(1)

    # -- when --------------------------------------------------------------------------------------------

    def call(self, idle: bool) -> bool:
        """Count a call that every rank makes; hear the news if it is time, and say whether it was."""
        turned, self._was_idle = idle != self._was_idle, idle
        self._waited_seconds = 0.0
        self._left -= 1
        if self._left > 0 and not turned and not (self._always and idle):
            return False
        self.word = self._hear(MOST_IDLE_CALLS if idle else MOST_BUSY_CALLS)
        return True

    def wait(self, enough: int, seconds: float, is_coming: Callable[[], bool] = lambda: False) -> None:
        """Let rank 0 wait until `enough` granules were created or are refused, `seconds` at most; hear it.

        While more `is_coming` to rank 0 it waits for that too. All waits since the last call() share the
        `seconds`: what has come by then is a step's worth, and more comes while that step runs. Nothing else
        is heard: what is being admitted was promised by the limit as it was.
        """
        if self._ledger is not None:
            began = now = self._clock()
            give_up_at = began + seconds - self._waited_seconds
            while (
                now < give_up_at
                and not self._ledger.refused()
                and (self._ledger.created() < enough or is_coming())
            ):
                self.pause()
                now = self._clock()
            self._waited_seconds += now - began
        news = self._hear(MOST_BUSY_CALLS)
        self.word = self.word._replace(created=news.created, refused=news.refused)

    def pause(self) -> None:
        """Let a moment pass, so that memory can be made or given back."""
        self._sleep(_PAUSE_SECONDS)

    def _hear(self, most: int) -> LedgerReading:
        word = None if self._ledger is None else self._read(self._ledger, most)
        word = self._circle.share(word)
        self._calls = self._left = word.calls
        return word

    def _read(self, ledger: LedgerView, most: int) -> LedgerReading:
        now = self._clock()
        each = (now - self._heard_at) / max(1, self._calls - self._left)
        calls = most if each * most < HEAR_SECONDS else int(HEAR_SECONDS / each)
        self._heard_at = now
        return LedgerReading(
            int(now * 1e6),
            ledger.created(),
            ledger.granule_limit(),
            ledger.target_granules(),
            ledger.must_granules(),
            int(ledger.refused()),
            1 if self.is_alone else max(1, min(most, calls)),
        )

    # -- the governor's view -----------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Rank 0's time, in seconds."""
        return self.word.now_us / 1e6

    def created(self) -> int:
        """Return the granules ever created, the least over all ranks."""
        return self.word.created

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold at most."""
        return self.word.limit

    def target_granules(self) -> int:
        """Return how many each rank is asked to hold at most; 0 if it is not asked."""
        return self.word.target

    def must_granules(self) -> int:
        """Return likewise what is asked for the floor of another."""
        return self.word.must

    def refused(self) -> bool:
        """Say whether a rank has asked for memory and did not get it."""
        return bool(self.word.refused)

    def publish(self, usage: Usage) -> None:
        """Write what the engine does, which rank 0 does for all."""
        if self._ledger is not None:
            self._ledger.publish(usage)
