"""Keeps the ranks of an engine in step: rank 0 reads the ledger and sends its reading to the others.

Every rank makes its own decisions from the same numbers. So all ranks must get a reading at the same calls,
never by their own clocks, and the reading includes rank 0's time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from kvcached_core.ledger import EngineUsage
from kvcached_core.scheduler.governor import LedgerView
from kvcached_core.scheduler.polling import POLL_SECONDS, poll_while

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SYNC_SECONDS = 0.01  # about how often ranks share a reading
MAX_BUSY_CALLS, MAX_IDLE_CALLS = 4, 256  # calls between two readings; busy calls are slow


class LedgerReading(NamedTuple):
    """The ledger as rank 0 read it at its time `now_us`; the next reading is due after `calls` calls."""

    now_us: int
    created: int
    limit: int
    target: int
    must: int
    refused: int
    calls: int


class RankGroup(Protocol):
    """The ranks that share readings."""

    is_single: bool

    def share(self, reading: LedgerReading | None) -> LedgerReading:
        """Return rank 0's reading on every rank; the others pass None."""


class SingleRank:
    """A group of one rank."""

    is_single = True

    def share(self, reading: LedgerReading | None) -> LedgerReading:
        """Return the reading."""
        assert reading is not None
        return reading


class DistributedRanks:
    """Several ranks with a process group for host tensors; its first rank is rank 0."""

    is_single = False

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._source = torch.distributed.get_global_rank(group, 0)

    def barrier(self) -> None:
        """Return once every rank has called this."""
        torch.distributed.barrier(self._group)

    def share(self, reading: LedgerReading | None) -> LedgerReading:
        """Broadcast rank 0's reading; every rank must call this."""
        numbers = torch.tensor(reading or [0] * len(LedgerReading._fields), dtype=torch.int64)
        torch.distributed.broadcast(numbers, self._source, group=self._group)
        return LedgerReading(*numbers.tolist())


class RankSync:
    """The governor's view of the ledger: the last reading, the same on every rank."""

    def __init__(
        self,
        ledger: LedgerView | None,
        group: RankGroup,
        always_when_idle: bool,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`ledger` is None except on rank 0.

        `always_when_idle` is for a scheduler whose idle calls are rare: each of them takes a reading.
        """
        self._ledger = ledger
        self._group = group
        self.is_single = group.is_single
        self._always_when_idle = always_when_idle or group.is_single
        self._clock = clock
        self._sleep = sleep
        self._calls = self._calls_left = 1
        self._was_idle = True
        self._waited_seconds = 0.0  # since the last sync()
        self._read_at = clock()
        self.reading = self._share_reading(1)

    # -- when to read ------------------------------------------------------------------------------------

    def sync(self, idle: bool) -> bool:
        """Count a call that every rank makes, and share a new reading if it is due; say whether it was."""
        changed, self._was_idle = idle != self._was_idle, idle
        self._waited_seconds = 0.0
        self._calls_left -= 1
        if self._calls_left > 0 and not changed and not (self._always_when_idle and idle):
            return False
        self.reading = self._share_reading(MAX_IDLE_CALLS if idle else MAX_BUSY_CALLS)
        return True

    def wait(self, enough: int, seconds: float, is_coming: Callable[[], bool] = lambda: False) -> None:
        """Wait on rank 0 until `enough` granules were created or the ledger refused; `seconds` at most.

        Rank 0 goes on waiting while `is_coming` says that more memory is being created. All waits since the
        last sync() share the `seconds`. Only `created` and `refused` are read again: this step's requests
        were admitted under the earlier limit.
        """
        if self._ledger is not None:
            ledger, left_seconds = self._ledger, seconds - self._waited_seconds
            self._waited_seconds += poll_while(
                lambda: not ledger.refused() and (ledger.created() < enough or is_coming()),
                left_seconds, self._clock, self._sleep,
            )  # fmt: skip
        new = self._share_reading(MAX_BUSY_CALLS)
        self.reading = self.reading._replace(created=new.created, refused=new.refused)

    def pause(self) -> None:
        """Sleep for half a millisecond, so that the supply thread can work."""
        self._sleep(POLL_SECONDS)

    def _share_reading(self, most: int) -> LedgerReading:
        reading = None if self._ledger is None else self._read(self._ledger, most)
        reading = self._group.share(reading)
        self._calls = self._calls_left = reading.calls
        return reading

    def _read(self, ledger: LedgerView, most: int) -> LedgerReading:
        now = self._clock()
        each = (now - self._read_at) / max(1, self._calls - self._calls_left)
        calls = most if each * most < SYNC_SECONDS else int(SYNC_SECONDS / each)
        self._read_at = now
        return LedgerReading(
            int(now * 1e6),
            ledger.created(),
            ledger.granule_limit(),
            ledger.target_granules(),
            ledger.must_granules(),
            int(ledger.refused()),
            1 if self.is_single else max(1, min(most, calls)),
        )

    # -- the governor's view -----------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Rank 0's time, in seconds."""
        return self.reading.now_us / 1e6

    def created(self) -> int:
        """Return the granules ever created, the least over all ranks."""
        return self.reading.created

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold at most."""
        return self.reading.limit

    def target_granules(self) -> int:
        """Return how many granules each rank is asked to come down to; 0 if it is not asked."""
        return self.reading.target

    def must_granules(self) -> int:
        """Return the granules to come down to for another engine's floor; 0 if this engine is not asked."""
        return self.reading.must

    def refused(self) -> bool:
        """Say whether the ledger refused memory that a rank asked for."""
        return bool(self.reading.refused)

    def publish(self, usage: EngineUsage) -> None:
        """Write the engine's usage into the ledger; only rank 0 writes."""
        if self._ledger is not None:
            self._ledger.publish(usage)
