"""The memory that a worker holds, as its slot shows it: created, released, mapped.

A number that falls, or that follows a driver call, has one writer and is one aligned store, so it needs no
lock. The stores are ordered: if a worker dies between two of them, or another process reads, the slot shows
too much held rather than too little, and mapped <= ready <= leased <= ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcached_core.errors import InvariantError
from kvcached_core.histogram import MAP_BUCKETS, RECLAIM_BUCKETS
from kvcached_core.ledger.file.layout import OWNER_WORDS
from kvcached_core.ledger.membership import Membership
from kvcached_core.ledger.owned_slot import ring_waiting


class Holdings:
    """The granules of one worker, in numbers."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._own = membership.own
        self._met_since_ms = 0  # asked_since_ms of the reclaim that was met last

    def describe(self, *, page_bytes: int, granule_bytes: int, granule_count: int, blocks_per_granule: int,
                 block_count: int, stride_bytes: int) -> None:  # fmt: skip
        """Write the geometry, before the first lease."""
        member, leased = self._membership, self._own["leased_bytes"]
        with member.mutex:
            if granule_bytes <= 0 or leased:
                raise InvariantError(f"granules of {granule_bytes} bytes, while {leased} are leased")
            member.put("page_bytes", page_bytes)
            member.put("granule_count", granule_count)
            member.put("blocks_per_granule", blocks_per_granule)
            member.put("block_count", block_count)
            member.put("stride_bytes", stride_bytes)
            member.put("granule_bytes", granule_bytes)  # last: if it is not 0, the others are valid

    def created(self, granules: int) -> None:
        """Count `granules` more that have handles; ring the scheduler once all that is promised has."""
        member, own = self._membership, self._own
        with member.mutex:
            ready = own["ready_bytes"] + granules * own["granule_bytes"]
            if ready > own["leased_bytes"]:
                raise InvariantError(f"{ready} bytes would be ready, of {own['leased_bytes']} leased")
            member.put("ready_bytes", ready)
            member.add("created_granules", granules)
        if ready == own["leased_bytes"]:
            member.reporter.report("ready", granules=granules, ready_bytes=ready)
            member.slot.engine_bell.ring()

    def give_back(self, bytes_never_ready: int, granules_released: int, granules_withdrawn: int) -> None:
        """Lower the bytes held and promised; see Account.give_back."""
        member, own = self._membership, self._own
        with member.mutex:
            released = (granules_released + granules_withdrawn) * own["granule_bytes"]
            ready, leased = own["ready_bytes"] - released, own["leased_bytes"] - released - bytes_never_ready
            if not 0 <= ready <= leased:
                raise InvariantError(f"giving back leaves {ready} bytes ready of {leased} leased")
            with member.lock.held_if_possible():
                member.put("mapped_bytes", min(own["mapped_bytes"], ready))
                member.put("ready_bytes", ready)
                member.add("released_granules", granules_released)
                member.add("created_granules", -granules_withdrawn)
                member.put("leased_bytes", leased)
                member.put("ceiling_bytes", max(own["limit_applied"], min(own["ceiling_bytes"], leased)))
                member.add("create_failures", 1 if bytes_never_ready else 0)
                self._time_reclaim()
            if bytes_never_ready:
                member.slot.engine_bell.ring()  # the rest of the promise will not come
            ring_waiting(member.folder, member.slot.file, member.slot.index)

    def _time_reclaim(self) -> None:
        """Once the worker holds no more than its target, add the reclaim's duration to the histogram.

        Each reclaim counts once, if it has not lapsed.
        """
        member = self._membership
        if self._own["leased_bytes"] > member.slot.get("target_bytes"):
            return
        since_ms, now_ms = member.slot.get("asked_since_ms"), member.now_ms()
        if now_ms < member.slot.get("asked_until_ms") and since_ms not in (0, self._met_since_ms):
            self._met_since_ms = since_ms
            took_us = max(0, now_ms - since_ms) * 1000
            member.add(RECLAIM_BUCKETS.words[RECLAIM_BUCKETS.index_of(took_us)])
            member.add(RECLAIM_BUCKETS.words[-1], took_us)

    def recount(self, granules: int) -> None:
        """Count `granules` more as created and as released; nothing that exists changes."""
        member = self._membership
        with member.mutex:
            member.add("created_granules", granules)
            member.add("released_granules", granules)

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int, unmaps: int,
                map_times: Sequence[int]) -> None:  # fmt: skip
        """Show memory that is mapped, and memory outside the KV cache; see Account.publish."""
        member, own = self._membership, self._own
        with member.mutex:
            if mapped_bytes > own["ready_bytes"]:
                raise InvariantError(f"{mapped_bytes} bytes are mapped, of {own['ready_bytes']} ready")
            member.put("mapped_bytes", mapped_bytes)
            member.put("private_now_bytes", private_now_bytes)
            member.add("maps", maps)
            member.add("unmaps", unmaps)
            for name, value in zip(MAP_BUCKETS.words, map_times, strict=False):
                if own[name] != value:
                    member.put(name, value)

    def check(self) -> None:
        """Raise InvariantError unless I2 holds and the ledger, if it is there, shows these numbers."""
        member, own = self._membership, self._own
        with member.mutex:
            steps = [own[f"{name}_bytes"] for name in ("mapped", "ready", "leased", "ceiling")]
            if [0, *steps] != sorted([0, *steps]):
                raise InvariantError(f"mapped <= ready <= leased <= ceiling does not hold: {own}")
            granules = own["created_granules"] - own["released_granules"]
            if own["ready_bytes"] != granules * own["granule_bytes"]:
                raise InvariantError(f"{own['ready_bytes']} bytes are ready in {granules} granules")
            if member.slot.is_current():
                shown = {name: member.slot.get(name) for name in OWNER_WORDS if name in own}
                wrong = {name: value for name, value in shown.items() if value != own[name]}
                if wrong:
                    raise InvariantError(f"the ledger shows {wrong}, the account {own}")
