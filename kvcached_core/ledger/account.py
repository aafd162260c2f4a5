"""An account: what one worker holds of one device, as it promises, creates and gives back.

Only a lease, which could promise too much, takes the lock. A number that falls, or that follows a driver
call, has one writer and is one aligned store. The stores are in such an order that whoever dies, or reads,
between two of them sees too much held rather than too little, and mapped <= ready <= leased <= ceiling.
"""

from __future__ import annotations

import contextlib

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import BusyError, InvariantError
from kvcached_core.ledger import grant
from kvcached_core.ledger.layout import CONTROLS, FREE, OWNER_WORDS, UNHEARD
from kvcached_core.ledger.member import Member
from kvcached_core.ledger.seat import ring_waiting, sweep
from kvcached_core.ledger.storage import LedgerFile


class Account(Member):
    """The worker's side of the ledger. Thread-safe. Made by `attach`; sizes are bytes of this rank."""

    granule_bytes = 0  # of one granule on this rank; 0 before describe()

    @property
    def leased_bytes(self) -> int:
        return self._own["leased_bytes"]

    @property
    def ready_bytes(self) -> int:
        return self._own["ready_bytes"]

    @property
    def limit_bytes(self) -> int:
        """The limit this owner goes by."""
        return self._own["limit_applied"]

    @property
    def floor_bytes(self) -> int:
        """What this owner can always get back."""
        return self._own["floor_applied"]

    @property
    def wanted_bytes(self) -> int:
        """What the scheduler wants leased in all."""
        return self._seat.get("wanted_bytes")

    def describe(self, *, page_bytes: int, granule_bytes: int, granule_count: int, blocks_per_granule: int,
                 block_count: int, stride_bytes: int) -> None:  # fmt: skip
        """Write the geometry, before the first lease."""
        with self._mutex:
            if granule_bytes <= 0 or self.leased_bytes:
                raise InvariantError(
                    f"granules of {granule_bytes} bytes, while {self.leased_bytes} are leased"
                )
            self._put("page_bytes", page_bytes)
            self._put("granule_count", granule_count)
            self._put("blocks_per_granule", blocks_per_granule)
            self._put("block_count", block_count)
            self._put("stride_bytes", stride_bytes)
            self._put("granule_bytes", granule_bytes)  # last: where it is not 0, the others are there
            self.granule_bytes = granule_bytes

    def set_private_peak(self, peak_bytes: int) -> None:
        """Say what this process may come to take outside its KV cache; others leave that much free."""
        with self._mutex:
            self._put("private_peak_bytes", peak_bytes)

    def acknowledge(self) -> None:
        """Go by what tools have set, and come back to a ledger that was lost. Never waits for the lock."""
        self._seat.require_own_process()
        with self._mutex:
            if not self._seat.is_current():
                # If it is busy, the next turn or lease tries again.
                with contextlib.suppress(BusyError), self._exclusive(bound_seconds=2e-3):
                    pass
            if self._apply_controls():
                self._seat.engine_bell.ring()

    def _apply_controls(self) -> bool:
        """Apply changed controls. A tool writes a value before its generation, under the lock: a value
        read after a generation is that one's or a later one's, which is then acknowledged in its turn."""
        changed = False
        for control in CONTROLS:
            generation = self._seat.get(f"{control}_wanted_generation")
            if generation == self._own[f"{control}_applied_generation"]:
                continue
            value = self._seat.get(f"{control}_wanted")
            if control == "limit":
                value = min(value, self._capacity_bytes)
                self._put("ceiling_bytes", max(value, self.leased_bytes))
            self._put(f"{control}_applied", value)
            self._put(f"{control}_applied_generation", generation)
            changed = True
        return changed

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Promise up to `want_bytes` more; returns the bytes granted, whole granules, maybe 0.

        What is not granted is recorded as demand; whoever gives back then rings. `memory` is read before
        the lock is taken, so it may be old: a create may still fail, which gives the promise back.
        Raises BusyError, and then nothing was changed.
        """
        if self.granule_bytes == 0:
            raise InvariantError("lease() before describe()")
        if want_bytes <= 0:
            self.refuse(0)
            return 0
        with self._exclusive() as file:
            self._apply_controls()
            file.set_header("free_bytes", memory.free_bytes)
            file.set_header("total_bytes", memory.total_bytes)
            there = self._room(file, memory.free_bytes)
            if there.of_device < min(want_bytes, there.limit_bytes) and sweep(self._folder, file):
                there = self._room(file, memory.free_bytes)
            granted_bytes = grant.granted(want_bytes, there, self.granule_bytes)
            self._put("demand_bytes", want_bytes - granted_bytes)
            if granted_bytes:
                self._put("leased_bytes", self.leased_bytes + granted_bytes)
                self._add("lease_bytes", granted_bytes)
                self._add("leases")
            if granted_bytes < want_bytes:
                self._add("refusals")
            return granted_bytes

    def _room(self, file: LedgerFile, free_bytes: int) -> grant.Room:
        """Return the room for this owner; there is none while a living owner has yet to write its part."""
        claims = file.claims()
        taken = [slot for slot, claim in enumerate(claims) if claim != FREE]
        if UNHEARD in claims:
            ring_waiting(self._folder, file, self._seat.slot)
            return grant.Room(self.limit_bytes - self.leased_bytes, 0, 0)
        promises = [
            grant.Promise(*(file.get(slot, name) for name in grant.Promise._fields)) for slot in taken
        ]
        return grant.room(self.leased_bytes, self.limit_bytes, promises, self._capacity_bytes,
                          self._headroom_bytes, free_bytes)  # fmt: skip

    def created(self, granules: int) -> None:
        """Say that handles for `granules` more now exist. Rings nobody: a scheduler looks by itself."""
        with self._mutex:
            ready = self.ready_bytes + granules * self.granule_bytes
            if ready > self.leased_bytes:
                raise InvariantError(f"{ready} bytes would be ready, of {self.leased_bytes} leased")
            self._put("ready_bytes", ready)
            self._add("created_granules", granules)
        self._seat.engine_bell.ring()

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0) -> None:
        """Give back promises that the driver could not keep, and granules whose handles are released.

        Under the lock if it is to be had, so that whoever is short has recorded it before, and is rung, or
        sees the bytes. Without the lock that waiter's own timer finds them.
        """
        with self._mutex:
            released = granules_released * self.granule_bytes
            ready, leased = self.ready_bytes - released, self.leased_bytes - released - bytes_never_ready
            if not 0 <= ready <= leased:
                raise InvariantError(f"giving back leaves {ready} bytes ready of {leased} leased")
            with self._lock.held_if_possible():
                self._put("mapped_bytes", min(self._own["mapped_bytes"], ready))
                self._put("ready_bytes", ready)
                self._add("released_granules", granules_released)
                self._put("leased_bytes", leased)
                self._put("ceiling_bytes", max(self.limit_bytes, min(self._own["ceiling_bytes"], leased)))
                self._add("create_failures", 1 if bytes_never_ready else 0)
            ring_waiting(self._folder, self._seat.file, self._seat.slot)

    def refuse(self, unmet_bytes: int) -> None:
        """Record what is wanted and was not got; 0 when nothing is."""
        with self._mutex:
            if self._own["demand_bytes"] != unmet_bytes:
                self._put("demand_bytes", unmet_bytes)

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0) -> None:
        """Show what is mapped, what the process takes besides, and granules mapped and unmapped since."""
        with self._mutex:
            if mapped_bytes > self.ready_bytes:
                raise InvariantError(f"{mapped_bytes} bytes are mapped, of {self.ready_bytes} ready")
            self._put("mapped_bytes", mapped_bytes)
            self._put("private_now_bytes", private_now_bytes)
            self._add("maps", maps)
            self._add("unmaps", unmaps)

    def check(self) -> None:
        """Raise InvariantError unless I2 holds and the ledger, if it is there, shows these numbers."""
        with self._mutex:
            own = self._own
            if (
                not 0
                <= own["mapped_bytes"]
                <= own["ready_bytes"]
                <= own["leased_bytes"]
                <= own["ceiling_bytes"]
            ):
                raise InvariantError(f"mapped <= ready <= leased <= ceiling does not hold: {own}")
            handles = own["created_granules"] - own["released_granules"]
            if own["ready_bytes"] != handles * own["granule_bytes"]:
                raise InvariantError(f"{own['ready_bytes']} bytes are ready in {handles} granules")
            if self._seat.is_current():
                wrong = {
                    n: self._seat.get(n) for n in OWNER_WORDS if n in own and self._seat.get(n) != own[n]
                }
                if wrong:
                    raise InvariantError(f"the ledger shows {wrong}, the account {own}")

    def detach(self) -> None:
        """Leave the ledger; may be repeated. Raises InvariantError while anything is leased: as long as
        memory may exist it is counted, if need be until the process ends."""
        if self.leased_bytes and self.fileno() >= 0:
            raise InvariantError(f"detach() with {self.leased_bytes} bytes leased")
        super().detach()
