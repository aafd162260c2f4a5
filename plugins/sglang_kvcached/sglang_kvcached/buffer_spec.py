"""How the buffers of a pool lie in its arena, one after the other."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvcached_core.driver.base import Driver
from kvcached_core.geometry import Geometry, choose_page_bytes, make_geometry


class BufferSpec(NamedTuple):
    """`buffers` buffers of `rows` rows of `row_bytes`. A slot is a row; a page is `page_size` rows."""

    buffers: int
    rows: int
    row_bytes: int
    page_size: int

    @property
    def stride_bytes(self) -> int:
        """Bytes of an SGLang page in one buffer."""
        return self.row_bytes * self.page_size

    @property
    def page_count(self) -> int:
        """SGLang pages of a buffer, page 0 included."""
        return -(-self.rows // self.page_size)


def geometry_of(spec: BufferSpec, driver: Driver, wanted_bytes: int | None) -> Geometry:
    """Return the geometry of an arena for these buffers; `wanted_bytes` is the user's physical page size.

    The last granule may reach beyond the last page: addresses cost nothing. Raises UnsupportedError, with the
    numbers, if no physical page size will do.
    """
    stride, granularity = spec.stride_bytes, driver.granularity_bytes
    period = math.lcm(stride, granularity) // stride  # pages after which the pattern of boundaries repeats
    exact = driver.name == "host"
    padded = -(-spec.page_count // period) * period if exact else spec.page_count
    (physical,) = choose_page_bytes(
        [stride], spec.buffers, granularity, padded, driver.max_mappings, exact, wanted_bytes
    )
    granules = -(-spec.page_count * stride // physical)
    blocks = -(-granules * physical // stride)
    starts = [number * granules * physical for number in range(spec.buffers)]
    return make_geometry(physical, stride, starts, blocks, granularity)
