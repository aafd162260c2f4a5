"""The queue of starting engines: each claims the memory it will take, and waits until the device has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import CapacityError
from kvcached_core.ledger.file.layout import UNWRITTEN
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.membership import Membership
from kvcached_core.ledger.owned_slot import sweep
from kvcached_core.ledger.policy import arbiter, grant
from kvcached_core.ledger.reclaiming import reclaim, room_for
from kvcached_core.units import format_size


class Turn(NamedTuple):
    """The state of a start."""

    admitted: bool
    ahead: int = 0  # engines that came before and wait too
    missing_bytes: int = 0  # to be given back by other engines
    free_bytes: int = 0  # not promised to anybody


class StartQueue:
    """One worker's place in the queue, and its floor."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._own = membership.own

    def set_floor(self, floor_bytes: int) -> None:
        """Set this worker's floor. Raises CapacityError if the floors no longer fit (I3), BusyError."""
        with self._membership.exclusive() as file:
            self._check_floor(self._others(file), floor_bytes)
            self._take_floor(file, floor_bytes)

    def ask(self, private_bytes: int, floor_bytes: int, memory: MemoryInfo) -> Turn:
        """Claim memory outside the KV cache, and a floor; see Account.ask_to_start."""
        member = self._membership
        with member.exclusive() as file:
            sweep(member.folder, file)
            file.show_memory(memory)
            self._refuse_if_hopeless(file, private_bytes, floor_bytes, memory.total_bytes)
            now_ms = member.now_ms()
            if not self._own["queued_at_ms"]:
                member.put("queued_at_ms", now_ms)
            member.put("short_at_ms", now_ms)
            member.put("starting_bytes", 0)
            rows = file.rows()
            ahead = self._ahead(rows, now_ms)
            now, peak = self._own["private_now_bytes"], self._own["private_peak_bytes"]
            promised = max(0, peak - now)  # room for this worker, not for others
            room = room_for(member, file, rows, memory.free_bytes).of_device + promised
            claim = max(0, private_bytes - now) + max(0, floor_bytes - self._own["leased_bytes"])
            # A worker that needs no more than its promise does not wait, even if outsiders took the memory.
            missing = claim - room if claim > promised else 0
            if missing <= 0 and not ahead:
                self._admit(file, private_bytes, floor_bytes, claim, now_ms)
                return Turn(True, free_bytes=room)
            member.put("starting_bytes", max(0, claim - promised))
            rows = file.rows()  # with this worker's claim
            claims = arbiter.read_claims(rows, member.slot.index, 0, room - promised, now_ms)
            reclaim(member, file, rows, claims, now_ms)
            return Turn(False, ahead, max(0, missing), room)

    def _admit(self, file: LedgerFile, private_bytes: int, floor_bytes: int, claim: int, now_ms: int) -> None:
        member = self._membership
        member.put("private_peak_bytes", private_bytes)
        self._take_floor(file, floor_bytes)
        waited = (now_ms - self._own["queued_at_ms"]) / 1000
        member.put("queued_at_ms", 0)
        member.reporter.report("start", True, waited_seconds=waited, starting_bytes=claim)

    def withdraw(self) -> None:
        """Leave the queue, and drop a claim that was not admitted."""
        with self._membership.mutex:
            self.leave()

    def leave(self) -> None:
        """Leave the queue; the worker's mutex is held."""
        self._membership.put("starting_bytes", 0)
        self._membership.put("queued_at_ms", 0)

    def _ahead(self, rows: Mapping[int, Row], now_ms: int) -> int:
        """Return the number of engines that began to wait before this one; ties go by slot."""
        mine = (self._own["queued_at_ms"], self._membership.slot.index)
        waiting = [
            (row["queued_at_ms"], index)
            for index, row in rows.items()
            if arbiter.writes_minor_1(row)
            and row["queued_at_ms"]
            and now_ms - row["short_at_ms"] <= arbiter.FRESH_MS
        ]
        return sum(other < mine for other in waiting)

    def _others(self, file: LedgerFile) -> list[Row]:
        return [row for index, row in file.rows().items() if index != self._membership.slot.index]

    def _refuse_if_hopeless(self, file: LedgerFile, private: int, floor: int, total: int) -> None:
        """Raise CapacityError if the claim would not fit even with all other engines at their floors."""
        member, rows = self._membership, self._others(file)
        self._check_floor(rows, floor)
        floors = others = 0
        for row in rows:
            if row["claim"] != UNWRITTEN:
                # An engine never gives its last granule, with block 0, even without a floor (I7).
                floors += max(row["floor_wanted"], row["floor_applied"], row["granule_bytes"])
                others += max(row["private_peak_bytes"], row["private_now_bytes"])
        most = total - member.headroom_bytes - floors - others
        if private + floor > most:
            raise CapacityError(
                f"this engine takes {format_size(private)} outside its KV cache and has a floor of "
                f"{format_size(floor)}; {member.device.uuid} has {format_size(total)}: "
                f"{format_size(member.headroom_bytes)} headroom, {format_size(floors)} floors of other "
                f"engines and {format_size(others)} their weights and activations. "
                f"{format_size(max(0, most))} are left: lower a floor (kvctl floor), end an engine, use a "
                f"smaller model, or correct the estimate (kvcached.start_size)"
            )

    def _check_floor(self, others: Iterable[Row], floor: int) -> None:
        member = self._membership
        grant.check_floors(others, [floor], member.capacity_bytes, member.device.uuid)

    def _take_floor(self, file: LedgerFile, floor: int) -> None:
        file.set(self._membership.slot.index, "floor_wanted", floor)
        self._membership.put("floor_applied", floor)
