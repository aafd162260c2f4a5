"""Evicts cached blocks to empty granules, and reports it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from kvcached_core.scheduler.accounting import GranuleAccounting


class Evictor:
    """Evicts granules of cached blocks for a smaller budget, or because nothing used them for too long.

    `forget_blocks` is called with the cached blocks of each granule before the granule loses its contents:
    the engine's prefix cache must forget them. `event` is called once for each eviction, as "evict" with the
    number of `granules` and of `blocks`. Blocks not used for `cache_seconds` are too old; 0 is no age limit.
    """

    def __init__(
        self,
        granules: GranuleAccounting,
        forget_blocks: Callable[[Any], None],
        event: Callable[..., None] | None,
        cache_seconds: float,
    ) -> None:
        self._granules = granules
        self._forget_blocks = forget_blocks
        self._event = event
        self._cache_seconds = cache_seconds

    def shrink(self, most: int) -> None:
        """Unmap until at most `most` granules are mapped, or all that are left hold a used block."""
        with self._reporting() as evict:
            self._granules.shrink(most, evict)

    def expire(self, now: float) -> float | None:
        """Evict blocks that are too old; return when the next ones will be, or None."""
        if not self._cache_seconds:
            return None
        with self._reporting() as evict:
            return self._granules.expire(now, self._cache_seconds, evict)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[Callable[[Any], None]]:
        """Yield the function that evicts the blocks of one granule; report the sum afterwards."""
        evicted: list[int] = []

        def evict(blocks: Any) -> None:
            evicted.append(len(blocks))
            self._forget_blocks(blocks)

        yield evict
        if evicted and self._event is not None:
            self._event("evict", granules=len(evicted), blocks=sum(evicted))
