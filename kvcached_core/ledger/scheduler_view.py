"""The desk: the scheduler's side of the ledger. It never takes the lock; a call is a few loads or stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from kvcached_core.events import Kind, Value
from kvcached_core.ledger.file.doorbells import drain_bell
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.slots import LocalSlot, Slot, SlotGeometry, find_again, find_places


class EngineUsage(Protocol):
    """What an engine tells of its memory: blocks and granules, the same on every rank."""

    @property
    def used_blocks(self) -> int: ...
    @property
    def cached_blocks(self) -> int: ...
    @property
    def stranded_blocks(self) -> int: ...
    @property
    def needed_granules(self) -> int: ...
    @property
    def wanted_granules(self) -> int: ...
    @property
    def enough_granules(self) -> int: ...
    @property
    def released_granules(self) -> int: ...


class SchedulerView:
    """All ranks of one instance. For one thread. Made by `find`."""

    def __init__(self, runtime: Runtime, instance: str, places: list[Slot],
                 clock: Callable[[], float]) -> None:  # fmt: skip
        self._runtime = runtime
        self._clock = clock
        self._instance = instance
        self._places = places
        self._usage: EngineUsage | None = None
        self._created = self._limit = 0  # as last read

    @classmethod
    def find(cls, runtime: Runtime, instance: str, ranks: int,
             clock: Callable[[], float] = time.monotonic,
             elsewhere: Mapping[int, Slot] = MappingProxyType({})) -> SchedulerView:  # fmt: skip
        """Find the slots of an instance over all devices; `elsewhere` has those of ranks on other nodes.

        Raises LedgerError with what is missing. Rank 0 is on this node.
        """
        here = find_places(runtime, instance, set(range(ranks)) - elsewhere.keys())
        places = {**here, **elsewhere}
        return cls(runtime, instance, [places[rank] for rank in range(ranks)], clock)

    @property
    def geometry(self) -> tuple[SlotGeometry, ...]:
        """The geometry of each rank."""
        return tuple(place.geometry for place in self._places)

    def created(self) -> int:
        """Return the granules ever created, the least over ranks. Raises LedgerError if a slot is gone.

        It never falls: a rank withdraws only what it was told is not counted on (`created_most`).
        """
        least = -1
        for place in self._places:
            if not place.is_there():
                return self.created() if self._find_again() else self._created
            count = place.words[place.created_at]
            if most := place.words[place.most_at]:
                count = self._counted_on(place, count, most)
            if count < least or least < 0:
                least = count
        self._created = least
        return least

    @staticmethod
    def _counted_on(place: Slot, count: int, most: int) -> int:
        """Return what of a rank's granules is counted on; all again, once what it had above that is gone."""
        if count > most > place.words[place.released_at]:
            return most
        place.set("created_most", 0)
        place.ringer.ring()  # it grows again
        return count

    def _even_out(self, usage: EngineUsage) -> None:
        """Have ranks withdraw what they made beyond the least of all, once no more is wanted of these.

        Without that a rank that had come farther when growth ended would keep the rest, over its limit too.
        """
        if len(self._places) == 1:
            return
        least = self.created()
        if usage.wanted_granules > least - usage.released_granules:
            return
        for place in self._places:
            if place.is_there():
                self._keep_at_most(place, least)

    def _give_beyond(self, place: Slot, granules: int) -> None:
        """Have a rank that may hold so many withdraw what it has above them beyond the least of all.

        Nothing else would give it: it is in nobody's `held`. Two engines that each came far on another one
        of two nodes would wait for each other.
        """
        if self._usage is not None and len(self._places) > 1:
            self._keep_at_most(place, max(self._created, self._usage.released_granules + granules))

    @staticmethod
    def _keep_at_most(place: Slot, created: int) -> None:
        """Order what a rank made above `created`, which is no less than is counted on, to be withdrawn."""
        if place.words[place.created_at] > created and not place.words[place.most_at]:
            place.set("created_most", created)
            place.ringer.ring()

    def released(self) -> int:
        """Return the granules ever released, the most over ranks; 0 while no slot is there.

        More than were ever ordered say that the workers gave back all but granule 0 by themselves.
        """
        return max((p.words[p.released_at] for p in self._places if p.is_there()), default=0)

    def granule_limit(self) -> int:
        """Return how many granules each rank may hold: a lower limit at once, a higher one when applied."""
        least = -1
        for place in self._places:
            if not place.is_there():
                return self.granule_limit() if self._find_again() else self._limit
            words = place.words
            wanted, applied = words[place.wanted_at], words[place.applied_at]
            count = (wanted if wanted < applied else applied) // place.granule_bytes
            self._give_beyond(place, count)
            if count < least or least < 0:
                least = count
        self._limit = least
        return least

    def refused(self) -> bool:
        """Say whether a rank has asked for memory and did not get it, and nobody was asked to give it."""
        return any(p.words[p.demand_at] and not p.words[p.coming_at] for p in self._places if p.is_there())

    def target_granules(self) -> int:
        """Return how many granules each rank is asked to hold at most; 0 if none is asked."""
        return self._asked(lambda place: place.target_at)

    def must_granules(self) -> int:
        """Return likewise what is asked for another's floor: by preemption, if it takes too long."""
        return self._asked(lambda place: place.must_at)

    def _asked(self, index: Callable[[Slot], int]) -> int:
        least = now_ms = 0
        for place in self._places:
            if not place.is_there() or not (asked := place.words[index(place)]):
                continue
            now_ms = now_ms or int(self._clock() * 1000) + 1
            # What was asked lapses unless it is asked again: its waiter may have died.
            if now_ms < place.words[place.asked_until_at]:
                count = max(1, asked // place.granule_bytes)
                self._give_beyond(place, count)
                least = min(least or count, count)
        return least

    def publish(self, usage: EngineUsage) -> None:
        """Write what the engine does; rings the workers that have to make more or to let some go.

        Who has made enough is not rung for spare granules alone: a turn of its thread costs the engine's loop
        about as much as making ten, and with the next ring all that is wanted is made.
        """
        before, self._usage = self._usage, usage
        lets_go = before is None or usage.released_granules != before.released_granules
        grows = before is not None and (
            usage.wanted_granules > before.wanted_granules or usage.enough_granules > before.enough_granules
        )
        for place in self._places:
            if place.is_there():
                _write(place, usage)
                # What a rank has made is taken from it by us alone: who has enough stays so without a ring.
                held = place.words[place.created_at] - usage.released_granules
                if lets_go or (grows and held < usage.enough_granules):
                    place.ringer.ring()
        if not all(place.is_there() for place in self._places):
            self._find_again()
        self._even_out(usage)

    def count(self, evictions: int, preemptions: int, busy: bool, idle_since_ms: int) -> None:
        """Write what happened since the engine began, and whether requests run now, else since when not."""
        for place in self._places:
            if place.is_there():
                place.set("evictions", evictions)
                place.set("preemptions", preemptions)
                place.set("busy", int(busy))
                place.set("idle_since_ms", idle_since_ms)

    def report(self, kind: Kind, **data: Value) -> None:
        """Tell of an event, on the device of the first rank: what a scheduler does it does on all."""
        first = self._places[0]
        assert isinstance(first, LocalSlot), "rank 0 is on this node"
        first.reporter.report(kind, False, **data)

    def filenos(self) -> Sequence[int]:
        """Return the bells to poll: they ring when memory is ready or a limit has changed."""
        return [place.bell_fd for place in self._places]

    def drain(self) -> None:
        """Read what was rung."""
        for place in self._places:
            drain_bell(place.bell_fd)

    def close(self) -> None:
        """Let go of the files; the slots are their workers'."""
        for place in self._places:
            place.close()
        self._places = []

    def _find_again(self) -> bool:
        """Find the slots that their workers had to write elsewhere; say whether all are there now.

        Raises LedgerError if a slot is gone.
        """
        for place in find_again(self._runtime, self._instance, self._places):
            if self._usage is not None:
                _write(place, self._usage)
                place.ringer.ring()
        return all(place.is_there() for place in self._places)


def _write(place: Slot, usage: EngineUsage) -> None:
    block_bytes = place.geometry.block_bytes
    place.set("used_bytes", usage.used_blocks * block_bytes)
    place.set("cached_bytes", usage.cached_blocks * block_bytes)
    place.set("stranded_bytes", usage.stranded_blocks * block_bytes)
    place.set("ordered_granules", usage.released_granules)
    place.set("needed_bytes", usage.needed_granules * place.granule_bytes)
    place.set("wanted_bytes", usage.wanted_granules * place.granule_bytes)
