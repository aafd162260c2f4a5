"""Handles for granules that a step maps now: spare ones, or those of granules that are to be unmapped."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvcached_core.errors import DriverError, InvariantError
from kvcached_core.worker.arena import FENCE_BOUND_SECONDS, Handles
from kvcached_core.worker.arenas import Arenas
from kvcached_core.worker.deferred_unmap import DeferredUnmap
from kvcached_core.worker.handle_pool import HandlePool
from kvcached_core.worker.premapped import Premapped

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 20e-6, 1e-3


class HandleSource:
    """Finds handles for a step and maps them. The caller holds `changed`; a wait for a fence releases it."""

    def __init__(
        self,
        handles: HandlePool,
        deferred: DeferredUnmap,
        premapped: Premapped,
        arenas: Arenas,
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        self._handles = handles
        self._deferred = deferred
        self._premapped = premapped
        self._arenas = arenas
        self._changed = changed
        self._clock = clock

    def map(self, first: int, count: int, stream: int) -> None:
        """Map a row of granules, all or none; later work on `stream` reads zeros in them.

        Raises InvariantError if there are too few handles (I5), DriverError if a fence does not pass in a
        minute, and what the driver raises.
        """
        taken: list[Handles] = []
        each = self._arenas.ledger_granules(first)
        try:
            while len(taken) < count * each:
                taken.append(self._take_ledger_granule())
            granules = [sum(taken[at : at + each], ()) for at in range(0, len(taken), each)]
            self._arenas.map(first, granules, stream)
        except BaseException:
            self._handles.spare.extendleft(taken)
            raise

    def _take_ledger_granule(self) -> Handles:
        pause, give_up_at = _FIRST_PAUSE_SECONDS, self._clock() + FENCE_BOUND_SECONDS
        while not (taken := self._handles.take() or self._withdraw()):
            if not self._deferred and not self._premapped and not self._handles.cleaning:
                raise InvariantError("I5: the plan maps more granules than there are handles")
            if self._clock() > give_up_at:
                raise DriverError("wait for a fence", -1, f"not passed after {FENCE_BOUND_SECONDS:g} s")
            self._changed.wait(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
        return taken[0]

    def _withdraw(self) -> list[Handles]:
        """Unmap the oldest granule that waits, if its fence has passed, or a premapped one.

        Returns the handles of one ledger granule; the other handles become spare.
        """
        withdrawn = self._deferred.withdraw() or self._premapped.withdraw()
        taken = [part for handles in withdrawn for part in self._arenas.split(handles)]
        self._handles.spare.extend(taken[1:])
        return taken[:1]
