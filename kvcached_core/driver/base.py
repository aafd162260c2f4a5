"""The verbs every driver has. Sizes and addresses are bytes; nothing here retries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

Handle = int  # names physical memory of one page; meaningful to its driver only
Fence = Any  # returned by record(); meaningful to its driver only


class DeviceIdentity(NamedTuple):
    """Which device: `uuid` names the ledger (`GPU-...`, `MIG-...`, or `host`), `name` is for people."""

    uuid: str
    name: str


class MemoryInfo(NamedTuple):
    """Memory of the device now, as the driver reports it."""

    free_bytes: int
    total_bytes: int


def side_by_side(address: int, page_bytes: int, handles: Sequence[Handle]) -> Iterator[tuple[int, Handle]]:
    """Yield the address and the handle of each page of a row."""
    return zip(range(address, address + page_bytes * len(handles), page_bytes), handles, strict=True)


@runtime_checkable
class Driver(Protocol):
    """Physical memory that comes and goes behind reserved addresses.

    Every verb raises CapacityError if the device has no room and DriverError for any other failure, and
    then leaves the state as it was. Pages are multiples of `granularity_bytes`. docs/writing-a-driver.md
    says which thread calls which verb.
    """

    name: str
    granularity_bytes: int
    max_mappings: int  # how many pages may be mapped at once

    def identity(self) -> DeviceIdentity:
        """Return the device this driver works on."""

    def memory(self) -> MemoryInfo:
        """Return free and total memory; callable from any thread."""

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses without memory: an access faults. Return the first address."""

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Give addresses back; nothing may be mapped in them."""

    def create(self, size_bytes: int) -> Handle:
        """Create one page of physical memory; it exists, and is counted, when this returns."""

    def clean(self, handle: Handle) -> None:
        """Prepare a used handle, off the step path, so that its next map is cheap."""

    def release(self, handle: Handle) -> None:
        """Free the memory of an unmapped handle; it is free for others when this returns."""

    def map(self, address: int, page_bytes: int, handles: Sequence[Handle], stream: int = 0) -> None:
        """Map a row of pages, all or none, to read and write. Later work on `stream` reads zeros there."""

    def alias(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Map a handle at one more address, contents as they are; for warm-up only."""

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Unmap a row of pages at once, all or none. The caller has waited until no kernel uses them."""

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return an int8 tensor of shape (size_bytes,) over the range; its first page must be mapped."""

    def record(self, stream: int) -> Fence:
        """Return a fence after all work queued on `stream` so far."""

    def passed(self, fence: Fence) -> bool:
        """Say whether the work before the fence is complete; never blocks."""

    def own_stream(self) -> int:
        """Return a stream of the driver's own, for zeroing off the step path."""

    def follow(self, stream: int, fence: Fence) -> None:
        """Make all later work on `stream` wait for a fence; the caller does not wait."""

    def synchronize(self) -> None:
        """Wait until the device is idle; start-up, shutdown and sleep only."""

    def close(self) -> None:
        """Free all handles and everything else that the driver holds."""
