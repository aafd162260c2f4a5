"""How the rows of a pool lie in its arena: one lane for each buffer that SGLang indexes by slot."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvcached_core.driver.base import Driver
from kvcached_core.geometry import Geometry, choose_page_bytes, make_geometry


class BufferSpec(NamedTuple):
    """`number` buffers of `rows` rows of `row_bytes`; `page_size` rows are a page, the unit of allocation."""

    number: int
    rows: int
    row_bytes: int
    page_size: int

    @property
    def page_bytes(self) -> int:
        """Bytes of an SGLang page in one lane."""
        return self.row_bytes * self.page_size

    @property
    def page_count(self) -> int:
        """Pages that rows make, page 0 included."""
        return -(-self.rows // self.page_size)


def geometry_of(lanes: BufferSpec, driver: Driver, wanted_bytes: int | None) -> Geometry:
    """Return the geometry of an arena for these lanes, lane after lane.

    The last granule may reach beyond the last page: addresses cost nothing. Raises UnsupportedError, with the
    numbers, where no page of physical memory will do.
    """
    stride, granularity = lanes.page_bytes, driver.granularity_bytes
    whole = math.lcm(stride, granularity) // stride  # pages after which the pattern of boundaries repeats
    exact = driver.name == "host"
    padded = -(-lanes.page_count // whole) * whole if exact else lanes.page_count
    (physical,) = choose_page_bytes(
        [stride], lanes.number, granularity, padded, driver.max_mappings, exact, wanted_bytes
    )
    granules = -(-lanes.page_count * stride // physical)
    blocks = -(-granules * physical // stride)
    starts = [lane * granules * physical for lane in range(lanes.number)]
    return make_geometry(physical, stride, starts, blocks, granularity)
