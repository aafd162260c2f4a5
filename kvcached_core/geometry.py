"""Which bytes of an arena a granule has, and how large a page should be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvcached_core.errors import UnsupportedError
from kvcached_core.units import MIB, format_size

# Below 8 MiB the cost of a handle shows; above 32 MiB granules are too coarse to give back.
DEVICE_PAGES = (8 * MIB, 32 * MIB)
DEVICE_FAVOURITE = 16 * MIB
LARGEST_PAGE = 64 * MIB  # for ranks with different strides
HOST_GRANULE = 1 * MIB  # the least size of a granule


def first_block(granule: int, page_bytes: int, stride_bytes: int) -> int:
    """Return the first block that starts in the page of a granule."""
    return -(-granule * page_bytes // stride_bytes)


@dataclass(frozen=True)
class Geometry:
    """Pages and blocks of one rank's arena.

    Block b of segment s occupies [starts[s] + b*stride, starts[s] + (b+1)*stride).
    Granule g is the bytes [starts[s] + g*page, starts[s] + (g+1)*page) of every segment, and the
    first `blocks_per_granule` blocks that lie wholly inside. A block over a boundary is never handed out.
    """

    page_bytes: int
    stride_bytes: int
    starts: tuple[int, ...]
    block_count: int
    blocks_per_granule: int
    granule_count: int

    @property
    def granule_bytes(self) -> int:
        """Bytes of one granule on this rank."""
        return self.page_bytes * len(self.starts)

    @property
    def waste(self) -> float:
        """Return the share (0 to 1) of a granule that its blocks do not use."""
        return 1 - self.blocks_per_granule * self.stride_bytes / self.page_bytes

    def first_block(self, granule: int) -> int:
        """Return the first block that starts in this granule's page."""
        return first_block(granule, self.page_bytes, self.stride_bytes)

    def blocks(self, granule: int) -> range:
        """Return the blocks that belong to a granule."""
        first = self.first_block(granule)
        return range(first, first + self.blocks_per_granule)

    def granule_of(self, block: int) -> int:
        """Return the page index in which a block starts; for a block of a granule, that granule."""
        return block * self.stride_bytes // self.page_bytes

    def bytes_of_blocks(self, blocks: int) -> int:
        """Return the memory, in bytes, of the granules that hold this many blocks."""
        return -(-blocks // self.blocks_per_granule) * self.granule_bytes

    def ranges(self, granule: int) -> tuple[int, ...]:
        """Return the byte offset of this granule's page in every segment."""
        return tuple(start + granule * self.page_bytes for start in self.starts)

    def describe(self) -> str:
        """Return one line for the log."""
        return (
            f"page {format_size(self.page_bytes)}, {len(self.starts)} segment(s), "
            f"granule {format_size(self.granule_bytes)} = {self.blocks_per_granule} blocks "
            f"of {format_size(self.stride_bytes * len(self.starts))}, {self.granule_count} granules, "
            f"waste {self.waste:.1%}"
        )


def make_geometry(
    page_bytes: int, stride_bytes: int, starts: Sequence[int], block_count: int, granularity_bytes: int
) -> Geometry:
    """Return the geometry of an arena.

    Raises UnsupportedError, with the numbers, if a page or the start of a segment is no multiple of the
    granularity, if segments overlap, or if some granule would hold no whole block.
    """
    _require_multiple("page", page_bytes, granularity_bytes)
    for start in starts:
        _require_multiple("start of a segment", start, granularity_bytes)
    granule_count = block_count * stride_bytes // page_bytes
    ordered = sorted(starts)
    if any(after - before < granule_count * page_bytes for before, after in itertools.pairwise(ordered)):
        raise UnsupportedError(
            f"segments at {ordered} overlap: {granule_count} pages of {page_bytes} bytes each"
        )
    per_granule = _blocks_per_granule(page_bytes, stride_bytes, granule_count)
    if per_granule < 1:
        raise UnsupportedError(
            f"a page of {page_bytes} bytes holds no whole block of {stride_bytes} bytes everywhere in the "
            f"{block_count} blocks of a segment: choose a larger multiple of {granularity_bytes} bytes"
        )
    return Geometry(page_bytes, stride_bytes, tuple(starts), block_count, per_granule, granule_count)


def choose_page_bytes(
    strides: Sequence[int],
    segments: int,
    granularity_bytes: int,
    block_count: int,
    max_mappings: int,
    exact: bool,
    wanted_bytes: int | None = None,
) -> tuple[int, ...]:
    """Return a page size for each rank, such that a granule has the same number of blocks on all ranks.

    `strides` are the bytes of a block in one segment, per rank. With `exact` (host memory) no block lies
    over a page's boundary. `wanted_bytes` is the page size that the user chose, for the first rank; if all
    strides are equal it may be any multiple of the granularity.
    Raises UnsupportedError, with the numbers, if no page size is possible.
    """
    # G blocks fill whole pages on every rank, none over a boundary, exactly if G is a multiple of `step`.
    step = math.lcm(*(granularity_bytes // math.gcd(granularity_bytes, stride) for stride in strides))
    if len(set(strides)) == 1 and not (exact and wanted_bytes is None):
        page = _straddling_page(strides[0], segments, granularity_bytes, block_count, wanted_bytes)
        return (page,) * len(strides)
    if wanted_bytes is not None:
        count = _wanted_blocks(wanted_bytes, strides, step)
    elif exact:
        count = _host_blocks(max(strides), segments, block_count, max_mappings, step)
    else:
        count = _device_blocks(max(strides), segments, step)
    if not 0 < count <= block_count:
        raise UnsupportedError(
            f"a granule needs {count} blocks, and a segment has {block_count}: raise the limit"
        )
    return tuple(count * stride for stride in strides)


def _straddling_page(
    stride: int, segments: int, granularity: int, block_count: int, wanted: int | None
) -> int:
    """Return the page size with the least waste, or the wanted one, for ranks with equal strides."""
    if wanted is not None:
        _require_multiple("page size", wanted, granularity)
        return wanted
    whole = block_count * stride

    def blocks(page: int) -> int:
        return _blocks_per_granule(page, stride, whole // page)

    low, high = (-(-size // granularity) * granularity for size in DEVICE_PAGES)
    usable = [page for page in range(low, high + 1, granularity) if blocks(page)] if segments == 1 else []
    if usable:
        # The least waste is the most blocks per byte; of equal sizes the one nearest the favourite wins.
        return max(usable, key=lambda page: (blocks(page) / page, -abs(page - DEVICE_FAVOURITE)))
    # A page of two blocks less one byte holds a whole block wherever it begins.
    for page in range(granularity, min(whole, 2 * stride + granularity) + 1, granularity):
        if blocks(page):
            return page
    raise UnsupportedError(
        f"no page that is a multiple of {granularity} bytes holds a block of {stride} bytes within the "
        f"{block_count} blocks of a segment: raise the limit"
    )


def _host_blocks(stride: int, segments: int, block_count: int, max_mappings: int, step: int) -> int:
    """Return the fewest blocks for a granule of HOST_GRANULE that keep the pages below `max_mappings`."""
    whole_arena = block_count // step * step  # a small arena is one granule
    for_size = min(-(-HOST_GRANULE // (stride * segments)), whole_arena)
    for_count = -(-block_count * segments // max_mappings)
    return -(-max(1, for_size, for_count) // step) * step


def _device_blocks(stride: int, segments: int, step: int) -> int:
    """Return the blocks of a granule near the favourite page size, or the fewest with several segments."""
    favourite = DEVICE_FAVOURITE if segments == 1 else 0
    count = max(1, round(favourite / (step * stride))) * step
    if count * stride > LARGEST_PAGE:
        raise UnsupportedError(
            f"ranks with blocks of up to {stride} bytes share whole pages only every {step} blocks "
            f"({format_size(step * stride)}, over {format_size(LARGEST_PAGE)}): "
            "choose a block size or a pipeline split that makes the ranks' blocks alike"
        )
    return count


def _wanted_blocks(wanted: int, strides: Sequence[int], step: int) -> int:
    if wanted < 1 or wanted % (step * strides[0]):
        raise UnsupportedError(
            f"page size {wanted} bytes: expected a multiple of {step * strides[0]} bytes, "
            f"which is {step} blocks of {strides[0]} bytes and whole pages on every rank"
        )
    return wanted // strides[0]


def _blocks_per_granule(page: int, stride: int, granule_count: int) -> int:
    """Return the least number of whole blocks in any granule: page // stride, or one less."""
    if granule_count < 1:
        return 0
    # Where pages begin within a block repeats after stride / gcd(page, stride) granules.
    period = stride // math.gcd(page, stride)
    granules = range(min(period, granule_count))
    return max(0, min((g + 1) * page // stride - -(-g * page // stride) for g in granules))


def _require_multiple(what: str, value: int, granularity: int) -> None:
    if value < 0 or value % granularity or (what != "start of a segment" and not value):
        raise UnsupportedError(f"{what} {value} bytes: expected a multiple of {granularity} bytes")
