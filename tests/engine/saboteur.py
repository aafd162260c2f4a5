"""Methods that damage an elastic cache on purpose, to prove that the tests detect damage."""

from __future__ import annotations

import faulthandler

from devkit import sabotage
from kvcached_core.worker.pool import ElasticPool
from vllm_kvcached.worker_memory import WorkerMemory


class Saboteur:
    """Mixed into the worker by `--worker-extension-cls`; called over collective_rpc."""

    kv_memory: WorkerMemory

    def sabotage_overwrite(self) -> int:
        """Overwrite every mapped granule except the null block's with noise; return their number."""
        return sabotage.overwrite(self._pool())

    def sabotage_unmap(self) -> int:
        """Unmap every granule except the null block's, even granules in use; return their number."""
        faulthandler.enable()
        return sabotage.unmap(self._pool())

    def _pool(self) -> ElasticPool:
        assert self.kv_memory._pool is not None
        return self.kv_memory._pool
