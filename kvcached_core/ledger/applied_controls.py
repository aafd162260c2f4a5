"""A worker's side of limit, floor and weight: apply the values that tools set, and acknowledge them."""

from __future__ import annotations

import contextlib

from kvcached_core.errors import BusyError
from kvcached_core.ledger.file.layout import CONTROLS
from kvcached_core.ledger.membership import Membership

_BOUND_SECONDS = 2e-3


class AppliedControls:
    """The limit, floor and weight that one worker goes by."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def acknowledge(self) -> None:
        """Apply the values that tools set, and rejoin a ledger that was lost. Never waits for the lock."""
        member = self._membership
        member.slot.require_own_process()
        with member.mutex:
            if not member.slot.is_current():
                # If the lock is busy, the next turn or lease tries again.
                with contextlib.suppress(BusyError), member.exclusive(_BOUND_SECONDS):
                    pass
            changed = self.apply()
        if changed:
            self.report(locked=False)
            member.slot.engine_bell.ring()

    def apply(self) -> bool:
        """Apply changed controls; return whether there were any.

        A tool writes a value before its generation, under the lock. So a value that is read after a
        generation belongs to it or to a later one, which is acknowledged in its turn.
        """
        member, changed = self._membership, False
        for control in CONTROLS:
            generation = member.slot.get(f"{control}_wanted_generation")
            if generation == member.own[f"{control}_applied_generation"]:
                continue
            value = member.slot.get(f"{control}_wanted")
            if control == "limit":
                value = min(value, member.capacity_bytes)
                member.put("ceiling_bytes", max(value, member.own["leased_bytes"]))
            member.put(f"{control}_applied", value)
            member.put(f"{control}_applied_generation", generation)
            changed = True
        return changed

    def report(self, locked: bool) -> None:
        """Report the controls that are applied now to observers."""
        limit, floor, weight = (self._membership.own[f"{control}_applied"] for control in CONTROLS)
        self._membership.reporter.report("limit", locked, limit_bytes=limit, floor_bytes=floor, weight=weight)
