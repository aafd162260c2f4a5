"""Starting: an engine claims what it will take before it takes it, and waits until it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import CapacityError
from kvcached_core.ledger.file.layout import UNHEARD
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.member import Member
from kvcached_core.ledger.owned_slot import ring_waiting, sweep
from kvcached_core.ledger.policy import arbiter, grant
from kvcached_core.units import format_size


class Turn(NamedTuple):
    """How a start stands."""

    admitted: bool
    ahead: int = 0  # engines that came before and wait too
    missing_bytes: int = 0  # still to be given back by others
    free_bytes: int = 0  # what nobody has been promised


class Starter(Member):
    """A member with a share of its device, before and after it serves."""

    @property
    def limit_bytes(self) -> int:
        """The limit this owner goes by."""
        return self._own["limit_applied"]

    @property
    def floor_bytes(self) -> int:
        """What this owner can always get back."""
        return self._own["floor_applied"]

    @property
    def private_peak_bytes(self) -> int:
        """What this process may come to take outside its KV cache, as it was said last."""
        return self._own["private_peak_bytes"]

    def set_private_peak(self, peak_bytes: int) -> None:
        """Say what this process may come to take outside its KV cache; others leave that much free."""
        with self._mutex:
            self._put("private_peak_bytes", peak_bytes)

    def set_floor_bytes(self, floor_bytes: int) -> None:
        """Set one's own floor. Raises CapacityError if the floors no longer fit (I3), BusyError."""
        with self._exclusive() as file:
            self._check_floor(self._others(file), floor_bytes)
            self._take_floor(file, floor_bytes)

    def ask_to_start(self, private_bytes: int, floor_bytes: int, memory: MemoryInfo) -> Turn:
        """Claim what this engine takes outside its KV cache, and its floor; call again until admitted.

        Until then others are asked to give back, and get nothing more that would be in the way. From then
        on nobody else is granted it. Who asks no more for a second, stopped or dead, is not waited for.
        Raises CapacityError if it can never fit beside the floors of others, BusyError.
        """
        with self._exclusive() as file:
            sweep(self._folder, file)
            file.show_memory(memory)
            self._refuse_if_hopeless(file, private_bytes, floor_bytes, memory.total_bytes)
            now_ms = self._now_ms()
            if not self._own["queued_at_ms"]:
                self._put("queued_at_ms", now_ms)
            self._put("short_at_ms", now_ms)
            self._put("starting_bytes", 0)
            rows = file.rows()
            ahead = self._ahead(rows, now_ms)
            now, peak = self._own["private_now_bytes"], self._own["private_peak_bytes"]
            promised = max(0, peak - now)  # which is no room for others, but for this engine
            there = self._room(file, rows, memory.free_bytes).of_device + promised
            claim = max(0, private_bytes - now) + max(0, floor_bytes - self._own["leased_bytes"])
            # Who needs no more than it was promised waits for nobody, even where outsiders broke promises.
            missing = claim - there if claim > promised else 0
            if missing <= 0 and not ahead:
                self._put("private_peak_bytes", private_bytes)
                self._take_floor(file, floor_bytes)
                waited = (now_ms - self._own["queued_at_ms"]) / 1000
                self._put("queued_at_ms", 0)
                self._reporter.report("start", True, waited_seconds=waited, starting_bytes=claim)
                return Turn(True, free_bytes=there)
            self._put("starting_bytes", max(0, claim - promised))
            rows = file.rows()  # its own claim is among them now
            self._arbitrate(file, rows, arbiter.survey(rows, self.slot, 0, there - promised, now_ms), now_ms)
            return Turn(False, ahead, max(0, missing), there)

    def ask_no_more(self) -> None:
        """Withdraw what is claimed and was not admitted."""
        with self._mutex:
            self._put("starting_bytes", 0)
            self._put("queued_at_ms", 0)

    def _ahead(self, rows: Mapping[int, Row], now_ms: int) -> int:
        """Return how many wait for their start since before this one; ties go by slot."""
        mine = (self._own["queued_at_ms"], self.slot)
        waiting = [
            (row["queued_at_ms"], slot)
            for slot, row in rows.items()
            if arbiter.speaks(row) and row["queued_at_ms"] and now_ms - row["short_at_ms"] <= arbiter.FRESH_MS
        ]
        return sum(other < mine for other in waiting)

    def _others(self, file: LedgerFile) -> list[Row]:
        return [row for slot, row in file.rows().items() if slot != self.slot]

    def _refuse_if_hopeless(self, file: LedgerFile, private: int, floor: int, total: int) -> None:
        rows = self._others(file)
        self._check_floor(rows, floor)
        floors = others = 0
        for row in rows:
            if row["claim"] != UNHEARD:
                # Nobody gives its last granule, with block 0, whatever its floor (I7).
                floors += max(row["floor_wanted"], row["floor_applied"], row["granule_bytes"])
                others += max(row["private_peak_bytes"], row["private_now_bytes"])
        most = total - self._headroom_bytes - floors - others
        if private + floor > most:
            raise CapacityError(
                f"this engine takes {format_size(private)} outside its KV cache and has a floor of "
                f"{format_size(floor)}; {self.device.uuid} holds {format_size(total)}, of which "
                f"{format_size(self._headroom_bytes)} are headroom, {format_size(floors)} floors of other "
                f"engines and {format_size(others)} their weights and activations. "
                f"{format_size(max(0, most))} are left: lower a floor (kvctl floor), end an engine, use a "
                f"smaller model, or correct the estimate (kvcached.start_size)"
            )

    def _check_floor(self, others: Iterable[Row], floor: int) -> None:
        grant.check_floors(others, [floor], self._capacity_bytes, self.device.uuid)

    def _take_floor(self, file: LedgerFile, floor: int) -> None:
        file.set(self.slot, "floor_wanted", floor)
        self._put("floor_applied", floor)

    # -- what is there for this owner, and who else is asked for it --------------------------------------

    def _now_ms(self) -> int:
        """Return the milliseconds of the monotonic clock, which are never 0."""
        return int(self._clock() * 1000) + 1

    def _room(self, file: LedgerFile, rows: Mapping[int, Row], free_bytes: int) -> grant.Room:
        """Return the room for this owner; there is none while a living owner has yet to write its part."""
        mine = self._own["leased_bytes"]
        if any(row["claim"] == UNHEARD for row in rows.values()):
            ring_waiting(self._folder, file, self._seat.slot)
            return grant.Room(self.limit_bytes - mine, 0, 0)
        promises = [grant.Promise(*map(row.__getitem__, grant.Promise._fields)) for row in rows.values()]
        return grant.room(mine, self.limit_bytes, promises, self._capacity_bytes,
                          self._headroom_bytes, free_bytes)  # fmt: skip

    def _arbitrate(self, file: LedgerFile, rows: Mapping[int, Row], scene: arbiter.Scene, now_ms: int) -> int:
        """Ask those who hold more than they are entitled to, if anybody waits; lift what was asked before.

        Returns the bytes that others are asked for.
        """
        asks = arbiter.who_gives(scene)
        for slot in arbiter.write_asks(file, rows, self._folder, scene, asks, now_ms):
            self._reporter.report(
                "reclaim", locked=True, slot=slot, name=file.get_text(slot, "name"), taker=self.name,
                **{word: file.get(slot, word) for word in ("target_bytes", "must_bytes", "leased_bytes")},
            )  # fmt: skip
        return sum(ask.give for ask in asks.values())
