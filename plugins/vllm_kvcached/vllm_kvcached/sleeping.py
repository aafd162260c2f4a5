"""Sleep mode on one rank: other engines can use the memory of its KV cache and weights until it wakes.

vLLM frees and restores the weights itself. This plugin frees the KV cache, which grows again with requests.
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
    """The result of emptying one rank's KV cache, for the other ranks."""

    created: int
    problem: str = ""


def absent_bytes() -> int:
    """Return the bytes of weights that vLLM has freed but PyTorch's allocator still counts."""
    if current_platform.is_cpu():
        return 0
    from vllm.device_allocator import get_mem_allocator_instance

    data = get_mem_allocator_instance().pointer_to_data.values()
    return sum(int(one.handle[1]) for one in data if one.is_asleep)


class RankSleep:
    """Puts a rank to sleep and wakes it, by vLLM's tags. vLLM makes the same calls on every rank."""

    def __init__(
        self,
        pool: ElasticPool,
        driver: Driver,
        start: RankStartup,
        gather: Gather = gather,
        absent_bytes: Callable[[], int] = absent_bytes,
    ) -> None:
        """`absent_bytes` returns the bytes that PyTorch's allocator counts although vLLM has freed them."""
        self._gather = gather
        self._absent_bytes = absent_bytes
        self._pool = pool
        self._driver = driver
        self._start = start
        self._tags: set[str] = set()

    @contextlib.contextmanager
    def falling_asleep(self, tags: Iterable[str]) -> Iterator[None]:
        """Give the KV cache back, let vLLM free the weights, and offer both to other engines.

        If vLLM raises, this rank is as awake as before.
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
        """On every rank, claim the memory that vLLM is about to restore; then let vLLM restore it.

        Raises CapacityError, with the numbers, if there is no room; the engine then stays asleep.
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
        """Give back all granules but granule 0 on every rank, and make all ranks report the same count."""
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
    """Let vLLM fall asleep although other processes took memory meanwhile.

    vLLM's last action is to assert that free memory grew. By then it has freed everything.
    """
    try:
        yield
    except AssertionError as error:
        if str(error) != GREW:
            raise
        _log.info("kvcached: other processes took more memory than this engine freed as it fell asleep")
