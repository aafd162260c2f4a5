"""What a pool tells of itself."""

from __future__ import annotations

from typing import NamedTuple


class PoolStats(NamedTuple):
    """Granules by state, and counts since the pool began. created - released = held."""

    mapped: int
    deferred: int  # mapped, and waiting for a fence to be unmapped
    premapped: int  # mapped before any plan asked for it; zeroed, or being zeroed
    spare: int
    moving: int  # being cleaned or freed
    created: int
    released: int

    @property
    def held(self) -> int:
        """Return the granules in all states."""
        return self.mapped + self.deferred + self.premapped + self.spare + self.moving
