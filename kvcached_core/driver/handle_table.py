"""The live handles of a driver, and where each is mapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from kvcached_core.driver.base import Handle, side_by_side
from kvcached_core.errors import InvariantError


class Mapping(NamedTuple):
    """One mapped page."""

    size_bytes: int
    handle: Handle


class HandleTable:
    """Turns a misuse of a driver into an InvariantError before the system sees it.

    Needs no lock: single dictionary operations are atomic, and one thread at a time uses a handle or address.
    """

    def __init__(self, ranges: dict[int, int] | None = None) -> None:
        self.sizes: dict[Handle, int] = {}  # live handles
        self.mappings: dict[int, Mapping] = {}  # by address
        self.ranges = ranges or {}  # reserved: address -> size
        self._uses: Counter[Handle] = Counter()

    def check_mappable(
        self, address: int, page_bytes: int, handles: Sequence[Handle], exclusive: bool
    ) -> None:
        """Raise InvariantError unless each handle can be mapped at its address in the row."""
        if not handles or len(set(handles)) < len(handles):
            raise InvariantError(f"{handles} is not a row of different handles")
        for page, handle in side_by_side(address, page_bytes, handles):
            if self.sizes.get(handle) != page_bytes:
                raise InvariantError(f"handle {handle} is not a live page of {page_bytes} bytes")
            if exclusive and self._uses[handle]:
                raise InvariantError(f"handle {handle} is mapped already")
            if page in self.mappings:
                raise InvariantError(f"address {page:#x} is mapped already")
        end = address + page_bytes * len(handles)
        if not any(base <= address and end <= base + size for base, size in self.ranges.items()):
            raise InvariantError(f"address {address:#x} to {end:#x} is not reserved")

    def mapped(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Record a page that was mapped."""
        self.mappings[address] = Mapping(size_bytes, handle)
        self._uses[handle] += 1

    def unmappable(self, address: int, page_bytes: int, count: int) -> range:
        """Return the addresses of a row of pages. Raises InvariantError unless exactly these are mapped."""
        pages = range(address, address + page_bytes * count, page_bytes)
        for page in pages:
            found = self.mappings.get(page)
            if found is None or found.size_bytes != page_bytes:
                raise InvariantError(f"address {page:#x} is not a mapped page of {page_bytes} bytes")
        return pages

    def unmapped(self, address: int) -> None:
        """Record a page that was unmapped."""
        handle = self.mappings.pop(address).handle
        self._uses[handle] -= 1

    def check_releasable(self, handle: Handle) -> int:
        """Return the size of a live handle that is mapped nowhere, or raise InvariantError."""
        if handle not in self.sizes or self._uses[handle]:
            raise InvariantError(f"handle {handle} is not live, or it is still mapped")
        return self.sizes[handle]

    def released(self, handle: Handle) -> None:
        """Record a handle that was released."""
        del self.sizes[handle]
        self._uses.pop(handle, None)

    def check_unreservable(self, address: int, size_bytes: int) -> None:
        """Raise InvariantError unless this range is reserved and empty."""
        if self.ranges.get(address) != size_bytes:
            raise InvariantError(f"address {address:#x} + {size_bytes} bytes was not reserved as one range")
        if any(address <= page < address + size_bytes for page in self.mappings):
            raise InvariantError(f"range {address:#x} still has mapped pages")
