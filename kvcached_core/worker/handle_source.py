"""Handles for granules that a step maps now: spare ones, or those of granules that are on their way out."""

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
    """Used with `changed` held, which is given up while a fence is waited for."""

    def __init__(
        self,
        supply: HandlePool,
        pending: DeferredUnmap,
        ahead: Premapped,
        arenas: Arenas,
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        self._supply = supply
        self._pending = pending
        self._ahead = ahead
        self._arenas = arenas
        self._changed = changed
        self._clock = clock

    def map(self, first: int, count: int, stream: int) -> None:
        """Map a row of granules, all or none; work on `stream` from now on reads zeros there.

        Raises InvariantError if there are not as many handles (I5), DriverError if a fence does not pass, and
        what the driver raises.
        """
        units: list[Handles] = []
        each = self._arenas.units(first)
        try:
            while len(units) < count * each:
                units.append(self._take_unit())
            granules = [sum(units[at : at + each], ()) for at in range(0, len(units), each)]
            self._arenas.map(first, granules, stream)
        except BaseException:
            self._supply.spare.extendleft(units)
            raise

    def _take_unit(self) -> Handles:
        pause, give_up_at = _FIRST_PAUSE_SECONDS, self._clock() + FENCE_BOUND_SECONDS
        while not (taken := self._supply.take() or self._withdraw()):
            if not self._pending and not self._ahead and not self._supply.cleaning:
                raise InvariantError("I5: the plan maps more granules than there are handles")
            if self._clock() > give_up_at:
                raise DriverError("wait for a fence", -1, f"not passed after {FENCE_BOUND_SECONDS:g} s")
            self._changed.wait(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
        return taken[0]

    def _withdraw(self) -> list[Handles]:
        """Unmap the oldest granule that waits, if any can be: one unit is returned, others are spare."""
        withdrawn = self._pending.withdraw() or self._ahead.withdraw()
        units = [unit for handles in withdrawn for unit in self._arenas.split(handles)]
        self._supply.spare.extend(units[1:])
        return units[:1]
