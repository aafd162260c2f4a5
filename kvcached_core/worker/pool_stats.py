"""Counts of a pool's granules by state."""

from __future__ import annotations

from typing import NamedTuple


class PoolStats(NamedTuple):
    """Granules of the ledger by state, and counts since the pool began. created - released = held."""

    mapped: int
    deferred: int  # mapped until its fence has passed
    premapped: int  # mapped before a plan asked for it; zeroed, or being zeroed
    spare: int
    moving: int  # being cleaned or freed
    created: int
    released: int

    @property
    def held(self) -> int:
        """Granules in all states."""
        return self.mapped + self.deferred + self.premapped + self.spare + self.moving
