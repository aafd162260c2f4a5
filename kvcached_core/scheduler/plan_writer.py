"""Writes the plans of an engine: what its workers map, unmap and free with the next step."""

from __future__ import annotations

from kvcached_core.plan import Plan
from kvcached_core.scheduler.accounting import PlanSource


class PlanWriter:
    """Numbers plans from 0, and writes one only if something has changed since the last.

    `source` has the changes of the mapped granules. `released`, an argument of each method, is how many
    granules the scheduler has released since the engine began.
    """

    def __init__(self, source: PlanSource) -> None:
        self._source = source
        self._next_sequence = 0
        self._released_sent = 0

    def has_plan(self, released: int) -> bool:
        """Say whether there is a plan to send."""
        return self._source.changed or released != self._released_sent

    def gives_back(self, released: int) -> bool:
        """Say whether there is a plan to send with which the workers unmap or free memory."""
        return self._source.gives_back or released != self._released_sent

    def write(self, released: int) -> Plan | None:
        """Return the plan to send now, or None if nothing has changed."""
        if not self.has_plan(released):
            return None
        change = self._source.take_change()
        plan = Plan(self._next_sequence, change.unmap, change.map, released)
        self._next_sequence += 1
        self._released_sent = released
        return plan

    def drop(self, released: int) -> None:
        """Drop the changes since the last plan: the workers have carried them out without one."""
        self._source.take_change()
        self._released_sent = released
