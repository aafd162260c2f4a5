"""How much a lease may get: arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Promise(NamedTuple):
    """What one owner holds and may still take, in bytes."""

    leased_bytes: int
    ready_bytes: int
    private_now_bytes: int
    private_peak_bytes: int


class Room(NamedTuple):
    """What bounds a lease, in bytes; each may be negative. The least of them is the room there is."""

    limit_bytes: int  # up to the owner's own limit
    device_bytes: int  # up to what the device holds
    free_bytes: int  # of what the driver calls free, less what is promised of it

    @property
    def of_device(self) -> int:
        return min(self.device_bytes, self.free_bytes)


def room(own_leased_bytes: int, limit_bytes: int, promises: Iterable[Promise], capacity_bytes: int,
         headroom_bytes: int, free_bytes: int) -> Room:  # fmt: skip
    """Return the room for one owner, given the promises to all owners, its own among them."""
    leased = unkept = private = 0
    for promise in promises:
        leased += promise.leased_bytes
        unkept += max(0, promise.leased_bytes - promise.ready_bytes)
        private += max(0, promise.private_peak_bytes - promise.private_now_bytes)
    return Room(
        limit_bytes=limit_bytes - own_leased_bytes,
        device_bytes=capacity_bytes - headroom_bytes - leased,
        free_bytes=free_bytes - unkept - private - headroom_bytes,
    )


def granted(want_bytes: int, there: Room, granule_bytes: int) -> int:
    """Return the bytes to grant: whole granules, 0 <= granted <= want, never more than there is."""
    least = max(0, min(want_bytes, there.limit_bytes, there.of_device))
    return least // granule_bytes * granule_bytes
