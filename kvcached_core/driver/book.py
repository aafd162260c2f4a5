"""What a driver has given out: live handles and where each is mapped."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvcached_core.driver.base import Handle
from kvcached_core.errors import InvariantError


class Mapping(NamedTuple):
    """One mapped page."""

    size_bytes: int
    handle: Handle


class Book:
    """Keeps a driver honest: a misuse is an InvariantError before the system sees it.

    Not locked: single dictionary operations are atomic, and a handle or an address has one user at a time.
    """

    def __init__(self, ranges: dict[int, int] | None = None) -> None:
        self.sizes: dict[Handle, int] = {}  # live handles
        self.mappings: dict[int, Mapping] = {}  # by address
        self.ranges = ranges or {}  # reserved: address -> size
        self._uses: Counter[Handle] = Counter()

    def check_mappable(self, address: int, size_bytes: int, handle: Handle, exclusive: bool) -> None:
        """Raise InvariantError unless `handle` fits `address`, which is reserved and free."""
        if self.sizes.get(handle) != size_bytes:
            raise InvariantError(f"handle {handle} is not a live page of {size_bytes} bytes")
        if exclusive and self._uses[handle]:
            raise InvariantError(f"handle {handle} is mapped already")
        if address in self.mappings:
            raise InvariantError(f"address {address:#x} is mapped already")
        end = address + size_bytes
        if not any(base <= address and end <= base + size for base, size in self.ranges.items()):
            raise InvariantError(f"address {address:#x} + {size_bytes} bytes is not reserved")

    def mapped(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Note a page that is mapped now."""
        self.mappings[address] = Mapping(size_bytes, handle)
        self._uses[handle] += 1

    def check_unmappable(self, address: int, size_bytes: int) -> None:
        """Raise InvariantError unless exactly this page is mapped."""
        found = self.mappings.get(address)
        if found is None or found.size_bytes != size_bytes:
            raise InvariantError(f"address {address:#x} is not a mapped page of {size_bytes} bytes")

    def unmapped(self, address: int) -> None:
        """Note a page that is gone."""
        handle = self.mappings.pop(address).handle
        self._uses[handle] -= 1

    def check_releasable(self, handle: Handle) -> int:
        """Return the size of a live handle that is mapped nowhere, or raise InvariantError."""
        if handle not in self.sizes or self._uses[handle]:
            raise InvariantError(f"handle {handle} is not live, or it is still mapped")
        return self.sizes[handle]

    def released(self, handle: Handle) -> None:
        """Note a handle that is gone."""
        del self.sizes[handle]
        self._uses.pop(handle, None)

    def check_unreservable(self, address: int, size_bytes: int) -> None:
        """Raise InvariantError unless this range is reserved and empty."""
        if self.ranges.get(address) != size_bytes:
            raise InvariantError(f"address {address:#x} + {size_bytes} bytes was not reserved as one range")
        if any(address <= page < address + size_bytes for page in self.mappings):
            raise InvariantError(f"range {address:#x} still has mapped pages")
