"""The scheduler's view of the ledger. It never takes the lock: every call is a few loads or stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from kvcached_core.events import Kind, Value
from kvcached_core.ledger.file.doorbells import drain_bell
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.slots import LocalSlot, Slot, SlotGeometry, find_slots, replace_moved_slots


class EngineUsage(NamedTuple):
    """How an engine uses its memory; the scheduler publishes it, and every rank has the same numbers.

    A block is the engine's unit of KV cache, a granule is the group of blocks that is mapped as one.
    needed <= wanted <= limit, and enough <= wanted.
    """

    used_blocks: int  # held by requests, and the null block
    cached_blocks: int  # kept by the prefix cache alone
    stranded_blocks: int  # free and worthless, but in granules that other blocks keep mapped
    mapped_granules: int
    wanted_granules: int  # `enough_granules` and spare ones
    needed_granules: int  # for the requests alone, without cached blocks
    released_granules: int  # given up since the engine began
    enough_granules: int  # for the requests and cached blocks; with fewer the next steps would be short


class SchedulerView:
    """The slots of all ranks of one engine instance. For one thread. Made by `find`."""

    def __init__(self, runtime: Runtime, instance: str, slots: list[Slot],
                 clock: Callable[[], float]) -> None:  # fmt: skip
        self._runtime = runtime
        self._clock = clock
        self._instance = instance
        self._slots = slots
        self._usage: EngineUsage | None = None
        self._created = self._limit = 0  # the latest values read

    @classmethod
    def find(cls, runtime: Runtime, instance: str, ranks: int,
             clock: Callable[[], float] = time.monotonic,
             remote_slots: Mapping[int, Slot] = MappingProxyType({})) -> SchedulerView:  # fmt: skip
        """Find the slots of all ranks of an instance, over all devices of this node.

        `remote_slots` are the slots of ranks on other nodes; rank 0 is on this node. Raises LedgerError
        naming the ranks that were not found.
        """
        local_slots = find_slots(runtime, instance, set(range(ranks)) - remote_slots.keys())
        slots = {**local_slots, **remote_slots}
        return cls(runtime, instance, [slots[rank] for rank in range(ranks)], clock)

    @property
    def geometry(self) -> tuple[SlotGeometry, ...]:
        """The geometry of each rank."""
        return tuple(slot.geometry for slot in self._slots)

    def created(self) -> int:
        """Return the granules created so far, the minimum over ranks. Raises LedgerError if a slot is gone.

        The minimum never falls: a rank withdraws only granules above its `created_most`, and those are not
        counted here.
        """
        least = -1
        for slot in self._slots:
            if not slot.is_there():
                return self.created() if self._replace_moved() else self._created
            count = slot.words[slot.created_at]
            if most := slot.words[slot.most_at]:
                count = self._usable(slot, count, most)
            if count < least or least < 0:
                least = count
        self._created = least
        return least

    @staticmethod
    def _usable(slot: Slot, count: int, most: int) -> int:
        """Return how many of this rank's `count` granules the scheduler may use.

        At most `most`; the cap is lifted once the rank has freed its surplus.
        """
        if count > most > slot.words[slot.released_at]:
            return most
        slot.set("created_most", 0)
        slot.ringer.ring()  # the rank may grow again
        return count

    def _withdraw_surplus(self, usage: EngineUsage) -> None:
        """Make ranks free the granules that no other rank can match, once the engine wants no more.

        A rank that was ahead of the others when growth ended would otherwise keep its surplus, even over its
        limit.
        """
        if len(self._slots) == 1:
            return
        least = self.created()
        if usage.wanted_granules > least - usage.released_granules:
            return
        for slot in self._slots:
            if slot.is_there():
                self._cap_created(slot, least)

    def _withdraw_above(self, slot: Slot, granules: int) -> None:
        """Make a rank that may hold `granules` free the surplus above them that no other rank can match.

        That surplus is not part of the minimum over ranks, so no plan releases it. Two engines that are each
        ahead on a different node would otherwise wait for each other's surplus.
        """
        if self._usage is not None and len(self._slots) > 1:
            self._cap_created(slot, max(self._created, self._usage.released_granules + granules))

    @staticmethod
    def _cap_created(slot: Slot, created: int) -> None:
        """Order a rank to free its granules above `created`, which is at least the minimum over ranks."""
        if slot.words[slot.created_at] > created and not slot.words[slot.most_at]:
            slot.set("created_most", created)
            slot.ringer.ring()

    def released(self) -> int:
        """Return the granules released so far, the maximum over ranks; 0 while no slot can be read.

        If it is above the number that was ordered, the workers have released all but granule 0 by themselves,
        to sleep.
        """
        return max((p.words[p.released_at] for p in self._slots if p.is_there()), default=0)

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold.

        A lower limit counts at once, a higher one as soon as its worker has applied it.
        """
        least = -1
        for slot in self._slots:
            if not slot.is_there():
                return self.granule_limit() if self._replace_moved() else self._limit
            words = slot.words
            wanted, applied = words[slot.wanted_at], words[slot.applied_at]
            count = (wanted if wanted < applied else applied) // slot.granule_bytes
            self._withdraw_above(slot, count)
            if count < least or least < 0:
                least = count
        self._limit = least
        return least

    def refused(self) -> bool:
        """Return whether a rank lacks memory that it asked for and no other engine was asked to give back."""
        return any(p.words[p.demand_at] and not p.words[p.coming_at] for p in self._slots if p.is_there())

    def target_granules(self) -> int:
        """Return how many granules each rank is asked to keep at most; 0 if nothing is reclaimed from it."""
        return self._least_asked(lambda slot: slot.target_at)

    def must_granules(self) -> int:
        """Return the same for another engine's floor, for which the engine preempts requests if it must."""
        return self._least_asked(lambda slot: slot.must_at)

    def _least_asked(self, index: Callable[[Slot], int]) -> int:
        least = now_ms = 0
        for slot in self._slots:
            if not slot.is_there() or not (asked := slot.words[index(slot)]):
                continue
            now_ms = now_ms or int(self._clock() * 1000) + 1
            # A reclaim lapses unless it is repeated: the engine that waits for the memory may have died.
            if now_ms < slot.words[slot.asked_until_at]:
                count = max(1, asked // slot.granule_bytes)
                self._withdraw_above(slot, count)
                least = min(least or count, count)
        return least

    def publish(self, usage: EngineUsage) -> None:
        """Write the engine's usage, and ring the workers that have to create or to release granules.

        A worker that lacks only spare granules is not rung: a turn of its thread costs the engine's loop
        about as much time as creating ten granules. The next ring makes it create all that is wanted.
        """
        before, self._usage = self._usage, usage
        releases = before is None or usage.released_granules != before.released_granules
        grows = before is not None and (
            usage.wanted_granules > before.wanted_granules or usage.enough_granules > before.enough_granules
        )
        for slot in self._slots:
            if slot.is_there():
                _write(slot, usage)
                # Only this scheduler releases a rank's granules, so a rank that has enough need not be woken.
                held = slot.words[slot.created_at] - usage.released_granules
                if releases or (grows and held < usage.enough_granules):
                    slot.ringer.ring()
        if not all(slot.is_there() for slot in self._slots):
            self._replace_moved()
        self._withdraw_surplus(usage)

    def count(self, evictions: int, preemptions: int, busy: bool, idle_since_ms: int) -> None:
        """Write the evictions and preemptions so far, and whether requests run; if none, since when."""
        for slot in self._slots:
            if slot.is_there():
                slot.set("evictions", evictions)
                slot.set("preemptions", preemptions)
                slot.set("busy", int(busy))
                slot.set("idle_since_ms", idle_since_ms)

    def report(self, kind: Kind, **data: Value) -> None:
        """Report an event on the device of rank 0: a scheduler acts on all ranks alike."""
        first = self._slots[0]
        assert isinstance(first, LocalSlot), "rank 0 is on this node"
        first.reporter.report(kind, False, **data)

    def filenos(self) -> Sequence[int]:
        """Return the doorbells to poll: they ring when memory is ready or a limit has changed."""
        return [slot.bell_fd for slot in self._slots]

    def drain(self) -> None:
        """Empty the doorbells."""
        for slot in self._slots:
            drain_bell(slot.bell_fd)

    def close(self) -> None:
        """Close the files; the slots remain their workers'."""
        for slot in self._slots:
            slot.close()
        self._slots = []

    def _replace_moved(self) -> bool:
        """Find the slots that workers wrote again elsewhere; return whether all slots can be read now.

        Raises LedgerError if a slot is gone.
        """
        for slot in replace_moved_slots(self._runtime, self._instance, self._slots):
            if self._usage is not None:
                _write(slot, self._usage)
                slot.ringer.ring()
        return all(slot.is_there() for slot in self._slots)


def _write(slot: Slot, usage: EngineUsage) -> None:
    block_bytes = slot.geometry.block_bytes
    slot.set("used_bytes", usage.used_blocks * block_bytes)
    slot.set("cached_bytes", usage.cached_blocks * block_bytes)
    slot.set("stranded_bytes", usage.stranded_blocks * block_bytes)
    slot.set("ordered_granules", usage.released_granules)
    slot.set("needed_bytes", usage.needed_granules * slot.granule_bytes)
    slot.set("wanted_bytes", usage.wanted_granules * slot.granule_bytes)
