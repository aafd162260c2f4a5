"""Sleep mode on one rank: the KV cache goes back, and what vLLM frees is there for others until it wakes.

vLLM frees and restores its weights itself; the KV cache is ours, and comes back as requests need it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from vllm.platforms import current_platform

from kvcached_core.driver.base import Driver
from kvcached_core.errors import KVCachedError
from kvcached_core.startup.rank_start import Gather, RankStartup
from kvcached_core.worker.pool import ElasticPool
from vllm_kvcached.ranks import gather

_log = logging.getLogger(__name__)

TAGS = frozenset(("weights", "kv_cache"))
GREW = "Memory usage increased after sleeping."  # vLLM's assertion


class _EmptyResult(NamedTuple):
    """What became of a rank's KV cache, as the ranks tell each other."""

    created: int
    problem: str = ""


def absent_bytes() -> int:
    """Return what the tensors' allocator counts of weights that vLLM has freed."""
    if current_platform.is_cpu():
        return 0
    from vllm.device_allocator import get_mem_allocator_instance

    data = get_mem_allocator_instance().pointer_to_data.values()
    return sum(int(one.handle[1]) for one in data if one.is_asleep)


class RankSleep:
    """What sleeps of a rank, by vLLM's tags. Every rank is told the same."""

    def __init__(
        self,
        pool: ElasticPool,
        driver: Driver,
        start: RankStartup,
        gather: Gather = gather,
        absent_bytes: Callable[[], int] = absent_bytes,
    ) -> None:
        """`absent_bytes` returns what the tensors' allocator counts though vLLM has freed it."""
        self._gather = gather
        self._absent_bytes = absent_bytes
        self._pool = pool
        self._driver = driver
        self._start = start
        self._tags: set[str] = set()

    @contextlib.contextmanager
    def falling_asleep(self, tags: Iterable[str]) -> Iterator[None]:
        """Give the KV cache back, let vLLM free what it frees, and offer that to others.

        Raises what vLLM raises; then this rank is as awake as it was.
        """
        before = frozenset(self._tags)
        self._empty()
        self._tags |= set(tags)
        try:
            yield
        except BaseException:
            self._tags &= before
            if not self._tags:
                self._pool.sleep.end()
            raise
        self._start.private.absent_bytes = self._absent_bytes()
        self._start.note_asleep()
        self._pool.sleep.take_turn()

    @contextlib.contextmanager
    def waking_up(self, tags: Iterable[str] | None) -> Iterator[None]:
        """Claim what vLLM is about to restore, on every rank, and let it do so.

        Raises CapacityError with the numbers if there is no room; then the engine sleeps on.
        """
        self._start.wait_to_wake(self._driver.memory)
        try:
            yield
        except BaseException:
            self._start.private.absent_bytes = self._absent_bytes()
            self._start.note_asleep()
            raise
        self._tags -= self._tags.copy() if tags is None else set(tags)
        self._start.private.absent_bytes = self._absent_bytes()
        self._start.note_awake()
        if not self._tags:
            self._pool.sleep.end()
        self._pool.sleep.take_turn()

    def _empty(self) -> None:
        """Give back all but granule 0 on every rank, with the same count on all: more than was ordered."""
        pool, error = self._pool, None
        try:
            pool.sleep.begin()
        except KVCachedError as raised:
            error = raised
        ranks = self._gather(_EmptyResult(pool.sleep.created, str(error or "")))
        problems = [rank.problem for rank in ranks if rank.problem]
        if problems:
            failed = error or KVCachedError(problems[0])
            pool.sleep.fail(failed)
            raise failed
        pool.sleep.recount(max(rank.created for rank in ranks) + 1)


@contextlib.contextmanager
def others_may_grow() -> Iterator[None]:
    """Let vLLM's sleep pass where others took memory meanwhile: it compares what is free on the device.

    It asserts that last of all, with everything freed.
    """
    try:
        yield
    except AssertionError as error:
        if str(error) != GREW:
            raise
        _log.info("kvcached: other processes took more memory than this engine freed as it fell asleep")
