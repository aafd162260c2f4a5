"""The verbs every driver has. Sizes and addresses are bytes; nothing here retries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

Handle = int  # names physical memory of one page; meaningful to its driver only
Fence = Any  # what record() returned; meaningful to its driver only


class DeviceIdentity(NamedTuple):
    """Which device: `uuid` names the ledger (`GPU-...`, `MIG-...`, or `host`), `name` is for people."""

    uuid: str
    name: str


class MemoryInfo(NamedTuple):
    """What the driver says of the device right now."""

    free_bytes: int
    total_bytes: int


def side_by_side(address: int, page_bytes: int, handles: Sequence[Handle]) -> Iterator[tuple[int, Handle]]:
    """Yield the address of each page of a row, and its handle."""
    return zip(range(address, address + page_bytes * len(handles), page_bytes), handles, strict=True)


@runtime_checkable
class Driver(Protocol):
    """Physical memory that comes and goes behind reserved addresses.

    Every verb raises CapacityError where the device lacks room and DriverError for any other
    failure, and leaves the state as it was. Pages are multiples of `granularity_bytes`.
    """

    name: str
    granularity_bytes: int
    max_mappings: int  # how many pages may be mapped at once

    def identity(self) -> DeviceIdentity:
        """Return the device this driver works on."""

    def memory(self) -> MemoryInfo:
        """Return free and total memory; callable from any thread."""

    def reserve(self, size_bytes: int) -> int:
        """Reserve addresses with nothing behind them; an access faults. Returns the base address."""

    def unreserve(self, address: int, size_bytes: int) -> None:
        """Return addresses; everything in them must be unmapped."""

    def create(self, size_bytes: int) -> Handle:
        """Create one page of physical memory; it exists, and is counted, when this returns."""

    def clean(self, handle: Handle) -> None:
        """Do ahead of time, off the step path, what makes the next map of a used handle cheap."""

    def release(self, handle: Handle) -> None:
        """Free the memory of an unmapped handle; it is free for others when this returns."""

    def map(self, address: int, page_bytes: int, handles: Sequence[Handle], stream: int = 0) -> None:
        """Map a row of pages, all or none, for reading and writing. They read as zero to all later work on
        `stream`."""

    def alias(self, address: int, size_bytes: int, handle: Handle) -> None:
        """Map a handle at one more address, contents as they are; for warm-up only."""

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        """Take a row of pages away at once, all or none. No running kernel may use them: wait for a fence
        before."""

    def tensor(self, address: int, size_bytes: int) -> torch.Tensor:
        """Return an int8 tensor of shape (size_bytes,) over the range; its first page is mapped."""

    def record(self, stream: int) -> Fence:
        """Return a fence behind all work that `stream` has been given so far."""

    def passed(self, fence: Fence) -> bool:
        """Say whether the work before the fence is complete; never blocks."""

    def own_stream(self) -> int:
        """Return a stream beside the engine's, for zeroing off the step path."""

    def follow(self, stream: int, fence: Fence) -> None:
        """Make all later work on `stream` wait for a fence; the caller does not wait."""

    def synchronize(self) -> None:
        """Wait until the device is idle; start-up, shutdown and sleep only."""

    def close(self) -> None:
        """Free what the driver itself holds; live handles are freed with it."""
