"""Damage an elastic cache on purpose, to prove that the tests detect damage."""

from __future__ import annotations

import torch

from kvcached_core.worker.pool import ElasticPool


def overwrite(pool: ElasticPool) -> int:
    """Write noise over every mapped granule of the first arena except granule 0; return their number."""
    geometry = pool._arenas._geometries[0]
    generator = torch.Generator().manual_seed(7)
    granules = [granule for granule in _granules(pool) if granule < geometry.granule_count]
    for granule in granules:
        for offset in geometry.ranges(granule):
            page = pool.tensor[offset : offset + geometry.page_bytes].view(torch.float32)
            page.normal_(generator=generator)
    return len(granules)


def unmap(pool: ElasticPool) -> int:
    """Unmap every granule except granule 0, even granules in use; return their number."""
    granules = _granules(pool)
    for granule in granules:
        pool._arenas.unmap(granule)
    return len(granules)


def _granules(pool: ElasticPool) -> list[int]:
    return [granule for granule in pool._arenas.mapped if granule != 0]
