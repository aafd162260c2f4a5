"""An account: what one worker holds of one device, as it promises, creates and gives back.

Only a lease, which could promise too much, takes the lock. A number that falls, or that follows a driver
call, has one writer and is one aligned store. The stores are in such an order that whoever dies, or reads,
between two of them sees too much held rather than too little, and mapped <= ready <= leased <= ceiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import BusyError, InvariantError
from kvcached_core.histogram import MAP_BUCKETS, RECLAIM_BUCKETS
from kvcached_core.ledger.file.layout import CONTROLS, OWNER_WORDS, UNHEARD
from kvcached_core.ledger.file.storage import LedgerFile, Row
from kvcached_core.ledger.owned_slot import ring_waiting, sweep
from kvcached_core.ledger.peers import Peers
from kvcached_core.ledger.policy import arbiter, shares
from kvcached_core.ledger.policy.external_usage import Outside
from kvcached_core.ledger.start_queue import Starter


class Account(Starter):
    """The worker's side of the ledger. Thread-safe. Made by `attach`; sizes are bytes of this rank."""

    granule_bytes = 0  # of one granule on this rank; 0 before describe()
    _is_short = False  # since a lease got less than it asked for, until all that is wanted is there
    _met_since_ms = 0  # the ask that was met last
    _peers: Peers | None = None
    _outside: Outside | None = None

    @property
    def leased_bytes(self) -> int:
        return self._own["leased_bytes"]

    @property
    def ready_bytes(self) -> int:
        return self._own["ready_bytes"]

    @property
    def wanted_bytes(self) -> int:
        """What the scheduler wants leased in all, as far as the other ranks have come."""
        wanted = self._seat.get("wanted_bytes")
        most = None if self._peers is None else self._peers.most()
        return wanted if most is None else min(wanted, most * self.granule_bytes)

    @property
    def created_most(self) -> int:
        """Granules that the scheduler counts on, of those ever created: it waits for the others to be
        withdrawn. 0: it counts on all that every rank has."""
        return self._seat.get("created_most")

    def grow_with(self, ranks: Collection[int]) -> None:
        """From now on lease in step with the others of this engine's `ranks` on this machine, all described.

        Raises LedgerError naming those that are missing.
        """
        if len(ranks) > 1:
            self._peers = Peers(self._runtime, self._texts["instance"], self._own["rank"], ranks)

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

    def acknowledge(self) -> None:
        """Go by what tools have set, and come back to a ledger that was lost. Never waits for the lock."""
        self._seat.require_own_process()
        with self._mutex:
            if not self._seat.is_current():
                # If it is busy, the next turn or lease tries again.
                with contextlib.suppress(BusyError), self._exclusive(bound_seconds=2e-3):
                    pass
            changed = self._apply_controls()
        if changed:
            self._report_controls(locked=False)
            self._seat.engine_bell.ring()

    def _report_controls(self, locked: bool) -> None:
        limit, floor, weight = (self._own[f"{control}_applied"] for control in CONTROLS)
        self._reporter.report("limit", locked, limit_bytes=limit, floor_bytes=floor, weight=weight)

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

        What is not granted is recorded as demand, and those who hold more than their share are asked to
        give it back; whoever does then rings. `memory` is read before the lock is taken, so it may be old:
        a create may still fail, which gives the promise back.
        Raises BusyError, and then nothing was changed.
        """
        if self.granule_bytes == 0:
            raise InvariantError("lease() before describe()")
        if want_bytes <= 0:
            self.refuse(0)
            return 0
        with self._exclusive() as file:
            if self._apply_controls():
                self._report_controls(locked=True)
            file.show_memory(memory)
            if self._own["queued_at_ms"]:  # it begins though it was not told to
                self._put("starting_bytes", 0)
                self._put("queued_at_ms", 0)
            if UNHEARD in file.claims():
                sweep(self._folder, file)
            rows = file.rows()
            self._look_outside(file, rows, memory)
            if any(row["claim"] == UNHEARD for row in rows.values()):
                ring_waiting(self._folder, file, self.slot)
                self._fall_short(want_bytes)
                return 0
            return self._lease_among_all(file, rows, want_bytes, memory.free_bytes)

    def _look_outside(self, file: LedgerFile, rows: Mapping[int, Row], memory: MemoryInfo) -> None:
        self._outside = self._outside or Outside()
        has_changed = self._outside.look(
            rows.values(), memory, self.device.uuid, self._headroom_bytes, self._now_ms()
        )
        file.set_header("outside_bytes", self._outside.bytes)
        if has_changed:
            self._reporter.report("outside", locked=True, outside_bytes=self._outside.bytes,
                                  free_bytes=memory.free_bytes)  # fmt: skip

    def _lease_among_all(self, file: LedgerFile, rows: Mapping[int, Row], want: int, free_bytes: int) -> int:
        """Grant what this owner may have now, and ask others for the rest."""
        there, now_ms = self._room(file, rows, free_bytes), self._now_ms()
        # A long wish is leased a slice at a time; what others see, and are asked for, is all of it.
        wish = max(want, self.wanted_bytes - self.leased_bytes)
        scene = arbiter.survey(rows, self.slot, wish, there.of_device, now_ms)
        mine = scene.claim(self.slot)
        others = [claim for claim in scene.claims if claim.slot != self.slot]
        room = min(there.limit_bytes, there.of_device)
        if any(other.unmet or other.starting for other in others):
            granted = shares.grantable(mine, want, room, others, scene.of)
        else:
            granted = max(0, min(want, room))  # I10: what grantable() comes to where nobody else waits
        granted = granted // self.granule_bytes * self.granule_bytes
        if granted < min(want, there.limit_bytes) and sweep(self._folder, file):
            # The dead hold nothing and wait for nothing.
            return self._lease_among_all(file, file.rows(), want, free_bytes)
        if granted and (self._is_short or granted < want):
            self._put("kept_until_ms", now_ms + self._keep_ms)
        if granted:
            self._promise(granted)
        unmet = max(0, min(wish, there.limit_bytes) - granted) // self.granule_bytes * self.granule_bytes
        after = mine._replace(leased=mine.leased + granted, unmet=unmet)
        if after != mine:
            scene = scene.replaced(after, there.of_device - granted)
        coming = min(unmet, self._arbitrate(file, rows, scene, now_ms))
        left = wish - granted
        if granted < want:
            self._fall_short(left, now_ms, coming)
        else:
            self._note_demand(left, now_ms, coming=left)  # the next slice is leased at once
        return granted

    def _promise(self, granted: int) -> None:
        self._reporter.report("lease", locked=True, granted_bytes=granted,
                              leased_bytes=self.leased_bytes + granted)  # fmt: skip
        self._put("leased_bytes", self.leased_bytes + granted)
        self._add("lease_bytes", granted)
        self._add("leases")
        if self._peers is not None:
            self._peers.ring_next()

    def _fall_short(self, unmet: int, now_ms: int = 0, coming: int = 0) -> None:
        if not self._is_short:  # not each time that it is tried again
            self._reporter.report("demand", locked=True, unmet_bytes=unmet, leased_bytes=self.leased_bytes)
        self._is_short = True
        self._add("refusals")
        self._note_demand(unmet, now_ms, coming)

    def _note_demand(self, unmet: int, now_ms: int, coming: int) -> None:
        """Show what is still wanted, in such an order that what is coming is never taken for refused."""
        if unmet and now_ms:
            self._put("short_at_ms", now_ms)
        self._is_short &= unmet > 0
        words = [("coming_bytes", coming), ("demand_bytes", unmet)]
        for name, value in words if unmet else reversed(words):
            if self._own[name] != value:
                self._put(name, value)

    def created(self, granules: int) -> None:
        """Say that handles for `granules` more now exist.

        The scheduler is rung once all that was promised is there: one that has work looks by itself.
        """
        with self._mutex:
            ready = self.ready_bytes + granules * self.granule_bytes
            if ready > self.leased_bytes:
                raise InvariantError(f"{ready} bytes would be ready, of {self.leased_bytes} leased")
            self._put("ready_bytes", ready)
            self._add("created_granules", granules)
        if ready == self.leased_bytes:
            self._reporter.report("ready", granules=granules, ready_bytes=ready)
            self._seat.engine_bell.ring()

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0,
                  granules_withdrawn: int = 0) -> None:  # fmt: skip
        """Give back promises that the driver could not keep, and granules whose handles are gone.

        Those withdrawn are counted as though they had never been created: see `created_most`.
        Under the lock if it is to be had, so that whoever is short has recorded it before, and is rung, or
        sees the bytes. Without the lock that waiter's own timer finds them.
        """
        with self._mutex:
            released = (granules_released + granules_withdrawn) * self.granule_bytes
            ready, leased = self.ready_bytes - released, self.leased_bytes - released - bytes_never_ready
            if not 0 <= ready <= leased:
                raise InvariantError(f"giving back leaves {ready} bytes ready of {leased} leased")
            with self._lock.held_if_possible():
                self._put("mapped_bytes", min(self._own["mapped_bytes"], ready))
                self._put("ready_bytes", ready)
                self._add("released_granules", granules_released)
                self._add("created_granules", -granules_withdrawn)
                self._put("leased_bytes", leased)
                self._put("ceiling_bytes", max(self.limit_bytes, min(self._own["ceiling_bytes"], leased)))
                self._add("create_failures", 1 if bytes_never_ready else 0)
                self._note_met()
            if bytes_never_ready:
                self._seat.engine_bell.ring()  # no more of what was promised will come
            ring_waiting(self._folder, self._seat.file, self._seat.slot)

    def _note_met(self) -> None:
        """Count how long it took to come down to what is asked, once for each ask that has not lapsed."""
        if self.leased_bytes > self._seat.get("target_bytes"):
            return
        since_ms, now_ms = self._seat.get("asked_since_ms"), self._now_ms()
        if now_ms < self._seat.get("asked_until_ms") and since_ms not in (0, self._met_since_ms):
            self._met_since_ms = since_ms
            took_us = max(0, now_ms - since_ms) * 1000
            self._add(RECLAIM_BUCKETS.words[RECLAIM_BUCKETS.at(took_us)])
            self._add(RECLAIM_BUCKETS.words[-1], took_us)

    def recount(self, granules: int) -> None:
        """Count so many granules more as created, and as released since; nothing that exists changes."""
        with self._mutex:
            self._add("created_granules", granules)
            self._add("released_granules", granules)

    def refuse(self, unmet_bytes: int) -> None:
        """Record what is wanted and was not got; 0 when nothing is."""
        with self._mutex:
            self._note_demand(unmet_bytes, 0, coming=min(self._own["coming_bytes"], unmet_bytes))

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0,
                map_times: Sequence[int] = ()) -> None:  # fmt: skip
        """Show what is mapped, what is taken besides, (un)maps since, and a tally of all maps' times."""
        with self._mutex:
            if mapped_bytes > self.ready_bytes:
                raise InvariantError(f"{mapped_bytes} bytes are mapped, of {self.ready_bytes} ready")
            self._put("mapped_bytes", mapped_bytes)
            self._put("private_now_bytes", private_now_bytes)
            self._add("maps", maps)
            self._add("unmaps", unmaps)
            for word, value in zip(MAP_BUCKETS.words, map_times, strict=False):
                if self._own[word] != value:
                    self._put(word, value)

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
        if self._peers is not None:
            self._peers.close()
            self._peers = None
        super().detach()
