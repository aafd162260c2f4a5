"""Methods that damage an elastic cache on purpose, to prove that the tests detect damage."""

from __future__ import annotations

import faulthandler
from typing import Any

import torch


class Saboteur:
    """Mixed into the worker by `--worker-extension-cls`; called over collective_rpc."""

    kv_memory: Any

    def sabotage_overwrite(self) -> int:
        """Overwrite every mapped granule but the null block's with noise; return their number."""
        pool = self.kv_memory._pool
        geometry, granules = pool._geometry, self._granules()
        generator = torch.Generator().manual_seed(7)
        for granule in granules:
            for offset in geometry.ranges(granule):
                page = pool.tensor[offset : offset + geometry.page_bytes].view(torch.float32)
                page.normal_(generator=generator)
        return len(granules)

    def sabotage_unmap(self) -> int:
        """Unmap every granule but the null block's, even granules in use; return their number."""
        faulthandler.enable()
        granules = self._granules()
        for granule in granules:
            self.kv_memory._pool._arenas.unmap(granule)
        return len(granules)

    def _granules(self) -> list[int]:
        return [granule for granule in self.kv_memory._pool._arenas.mapped if granule != 0]
