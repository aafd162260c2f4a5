"""Snapshots of all ledgers, read without the lock from bytes that may be damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcached_core.errors import LedgerError
from kvcached_core.histogram import MAP_BUCKETS, RECLAIM_BUCKETS, HistogramReading
from kvcached_core.ledger.file import layout
from kvcached_core.ledger.file.layout import FREE, HEADER_AT, MINOR_1, MINOR_2, SLOT_AT, UNWRITTEN, WORD
from kvcached_core.ledger.file.runtime import DeviceFolder, Runtime
from kvcached_core.ledger.file.storage import Header, parse_header

_TRIES = 8
_HELD = ("leased_bytes", "ready_bytes", "mapped_bytes", "used_bytes", "cached_bytes", "stranded_bytes")
_TIMES = {"map_seconds": MAP_BUCKETS, "reclaim_seconds": RECLAIM_BUCKETS}


@dataclass(frozen=True)
class OwnerSnapshot:
    """One slot, with the fields of the layout; histograms are read as such. `live`: its owner is alive."""

    slot: int
    live: bool
    written: bool  # False: the owner has yet to write its numbers into a new file
    rank: int
    worker_pid: int
    instance: str
    name: str
    engine: str
    model: str
    page_bytes: int
    granule_bytes: int
    granule_count: int
    blocks_per_granule: int
    block_count: int
    stride_bytes: int
    limit_wanted: int
    limit_wanted_generation: int
    limit_applied: int
    limit_applied_generation: int
    floor_wanted: int
    floor_wanted_generation: int
    floor_applied: int
    floor_applied_generation: int
    weight_wanted: int
    weight_wanted_generation: int
    weight_applied: int
    weight_applied_generation: int
    leased_bytes: int
    ready_bytes: int
    mapped_bytes: int
    ceiling_bytes: int
    private_now_bytes: int
    private_peak_bytes: int
    created_granules: int
    released_granules: int
    demand_bytes: int
    reclaim_bytes: int
    leases: int
    lease_bytes: int
    refusals: int
    maps: int
    unmaps: int
    create_failures: int
    wanted_bytes: int
    ordered_granules: int
    used_bytes: int
    cached_bytes: int
    stranded_bytes: int
    evictions: int
    preemptions: int
    busy: int
    spoken_claim: int
    needed_bytes: int
    idle_since_ms: int
    target_bytes: int
    must_bytes: int
    asked_until_ms: int
    short_at_ms: int
    coming_bytes: int
    kept_until_ms: int
    starting_bytes: int
    queued_at_ms: int
    reclaims: int
    timed_claim: int
    created_most: int
    asked_since_ms: int
    map_seconds: HistogramReading
    reclaim_seconds: HistogramReading

    @property
    def spare_bytes(self) -> int:
        """KV memory that exists and is empty."""
        return max(0, self.ready_bytes - self.used_bytes - self.cached_bytes - self.stranded_bytes)

    @property
    def limit_bytes(self) -> int:
        """The limit that was set last, acknowledged or not."""
        return self.limit_wanted

    @property
    def floor_bytes(self) -> int:
        """KV memory that the engine can always get back: a limit below the floor wins."""
        return min(self.floor_wanted, self.limit_wanted)


@dataclass(frozen=True)
class DeviceSnapshot:
    """One device.

    `damage` says what is wrong in the file; it is empty if nothing is. `settled` is False if the file changed
    during every read, so fields may be of different moments.
    """

    folder: str
    uuid: str
    capacity_bytes: int
    headroom_bytes: int
    free_bytes: int  # reported by the driver at the latest lease
    total_bytes: int
    owners: tuple[OwnerSnapshot, ...]
    settled: bool = True
    damage: str = ""
    outside_bytes: int = 0  # used by processes outside the ledger, at the latest lease

    @property
    def leased_bytes(self) -> int:
        return sum(owner.leased_bytes for owner in self.owners)

    @property
    def ready_bytes(self) -> int:
        return sum(owner.ready_bytes for owner in self.owners)


def snapshot(runtime: Runtime) -> list[DeviceSnapshot]:
    """Return every device that has a ledger, sorted by folder. Raises LedgerError if one cannot be read."""
    found = []
    for folder in runtime.devices():
        try:
            data, settled = _read(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LedgerError(f"cannot read {folder.ledger}: {error.strerror}") from error
        found.append(parse(data, folder.alive, folder.path.name, settled))
    return found


def _read(folder: DeviceFolder) -> tuple[bytes, bool]:
    """Return the bytes, and whether two reads were equal.

    If they were, no writer was between two of its stores, or one has stopped there, as if it had died.
    """
    before = folder.ledger.read_bytes()
    for _ in range(_TRIES):
        data = folder.ledger.read_bytes()
        if data == before:
            return data, True
        before = data
    return before, False


def parse(
    data: bytes, alive: Callable[[int], bool], folder: str = "", settled: bool = True
) -> DeviceSnapshot:
    """Parse a ledger's bytes, damaged or not; numbers of held memory are cut to the capacity it states."""
    try:
        header = parse_header(data[: layout.HEADER_BYTES], len(data))
    except LedgerError as error:
        return DeviceSnapshot(folder, folder, 0, 0, 0, 0, (), settled, str(error))
    words = struct.unpack_from(f"<{layout.HEADER_WORDS}Q", data)
    uuid = data[HEADER_AT["uuid"] * WORD :][:64]
    damage: list[str] = []
    slots = (_parse_slot(data, header, slot, alive, damage) for slot in range(header.slot_count))
    owners = tuple(owner for owner in slots if owner is not None)
    free, total, outside = (
        min(words[HEADER_AT[name]], layout.WORD_LIMIT)
        for name in ("free_bytes", "total_bytes", "outside_bytes")
    )
    return DeviceSnapshot(
        folder, layout.decode_text(uuid), header.capacity_bytes, header.headroom_bytes, free, total,
        owners, settled, "; ".join(damage), outside,
    )  # fmt: skip


def _parse_slot(data: bytes, header: Header, slot: int, alive: Callable[[int], bool],
                damage: list[str]) -> OwnerSnapshot | None:  # fmt: skip
    start = header.header_bytes + slot * header.slot_bytes
    words = struct.unpack_from(f"<{layout.SLOT_WORDS}Q", data, start)
    claim = words[SLOT_AT["claim"]]
    if claim == FREE:
        return None
    # An owner of an earlier minor leaves the words of the slot's last owner behind its own.
    silent_from = min((SLOT_AT[mark] for mark in (MINOR_1, MINOR_2) if words[SLOT_AT[mark]] != claim),
                      default=layout.SLOT_WORDS)  # fmt: skip
    values: dict[str, Any] = {}
    for field in layout.SLOT[1:]:
        at = SLOT_AT[field.name]
        if field.text_bytes:
            values[field.name] = layout.decode_text(data[start + at * WORD :][: field.text_bytes])
            continue
        most = header.capacity_bytes if field.name in _HELD else layout.WORD_LIMIT
        values[field.name] = 0 if at >= silent_from else min(words[at], most)
        if words[at] > most and at < silent_from:
            damage.append(f"slot {slot}: {field.name} of {words[at]} is impossible")
    times: dict[str, Any] = {name: HistogramReading.of(buckets, [values.pop(word) for word in buckets.words])
             for name, buckets in _TIMES.items()}  # fmt: skip
    return OwnerSnapshot(slot=slot, live=alive(slot), written=claim != UNWRITTEN, **values, **times)
