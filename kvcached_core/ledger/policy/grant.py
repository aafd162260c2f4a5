"""The room for a lease, and the sum of floors: arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcached_core.errors import CapacityError
from kvcached_core.ledger.file.layout import UNWRITTEN
from kvcached_core.ledger.file.storage import Row
from kvcached_core.units import format_size


class Promise(NamedTuple):
    """Memory that one owner holds and may still take, in bytes."""

    leased_bytes: int
    ready_bytes: int
    private_now_bytes: int
    private_peak_bytes: int


class Room(NamedTuple):
    """The bounds of a lease, in bytes; each may be negative. The least of them is the room."""

    limit_bytes: int  # up to the owner's limit
    device_bytes: int  # up to the capacity of the device
    free_bytes: int  # free memory reported by the driver, less promises not yet taken

    @property
    def of_device(self) -> int:
        return min(self.device_bytes, self.free_bytes)


def room(own_leased_bytes: int, limit_bytes: int, promises: Iterable[Promise], capacity_bytes: int,
         headroom_bytes: int, free_bytes: int) -> Room:  # fmt: skip
    """Return the room for one owner; `promises` are those to all owners, itself included."""
    leased = not_ready = private = 0
    for promise in promises:
        leased += promise.leased_bytes
        not_ready += max(0, promise.leased_bytes - promise.ready_bytes)
        private += max(0, promise.private_peak_bytes - promise.private_now_bytes)
    return Room(
        limit_bytes=limit_bytes - own_leased_bytes,
        device_bytes=capacity_bytes - headroom_bytes - leased,
        free_bytes=free_bytes - not_ready - private - headroom_bytes,
    )


def check_floors(rows: Iterable[Row], wanted: Sequence[int], capacity_bytes: int, uuid: str) -> None:
    """Raise CapacityError unless floors of `wanted` bytes fit beside the floors of other slots, `rows` (I3).

    A floor that is being changed counts as the greater of wanted and applied, so I3 holds in every order of
    events.
    """
    floors = sum(max(row["floor_wanted"], row["floor_applied"]) for row in rows if row["claim"] != UNWRITTEN)
    if floors + sum(wanted) > capacity_bytes:
        ranks = f" on each of {len(wanted)} ranks" if len(wanted) > 1 else ""
        raise CapacityError(
            f"a floor of {format_size(max(wanted))}{ranks} does not fit on {uuid}: it holds "
            f"{format_size(capacity_bytes)}, and other engines have floors of {format_size(floors)}. Ask "
            f"for at most {format_size(max(0, capacity_bytes - floors) // len(wanted))}"
        )
