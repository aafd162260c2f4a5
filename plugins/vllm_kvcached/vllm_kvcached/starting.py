"""The start of one rank inside vLLM: its identity, its estimates and its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvcached_core.config import Config
from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.driver.nvml import memory_of, process_bytes
from kvcached_core.driver.registry import is_host
from kvcached_core.startup.private_memory import PrivateMemory, reserved_bytes
from kvcached_core.startup.rank_start import RankIdentity, RankStartup
from vllm_kvcached import nvml, weights
from vllm_kvcached.ranks import gather
from vllm_kvcached.support import instance

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class VllmRankStart(RankStartup):
    """Starts a rank with names, limits and estimates from vLLM's configuration."""

    def __init__(self, vllm_config: VllmConfig, settings: Config, rank: int) -> None:
        self._vllm_config = vllm_config
        model = vllm_config.model_config
        served = model.served_model_name
        name = str(served[0] if isinstance(served, list) else served or model.model)
        super().__init__(
            settings, RankIdentity("vllm", instance(vllm_config), rank, name, str(model.model)), gather
        )

    def limit_bytes(self) -> int:
        """Return the limit in bytes: the setting, but at most vLLM's own --kv-cache-memory-bytes."""
        limit = super().limit_bytes()
        explicit: int | None = self._vllm_config.cache_config.kv_cache_memory_bytes
        return min(limit, explicit) if explicit else limit

    # -- called in this order -----------------------------------------------------------------------------

    def make_room_on(self, local_rank: int) -> None:
        """Wait until a CUDA context fits on the rank's device. Raises CapacityError."""
        uuid = nvml.uuid_of(local_rank)
        if uuid is not None:
            self.make_room_for_context(uuid, lambda: memory_of(uuid, nvml.library))

    def enter_with(
        self,
        device: torch.device,
        identity: DeviceIdentity,
        capacity_bytes: int,
        mapped_bytes: Callable[[], int],
    ) -> None:
        """Attach to the ledger of an open device, and start to report how much memory loading takes."""
        private = PrivateMemory(
            None if is_host(device.type) else lambda: reserved_bytes(device),
            lambda: process_bytes(identity.uuid, nvml.library),
            lambda: self.account.ready_bytes,
        )
        self.enter(identity, capacity_bytes, private, mapped_bytes)

    def wait_to_load(self, memory: Callable[[], MemoryInfo], on_host: bool) -> None:
        """Wait until every rank may load. If one is refused, all raise CapacityError with the numbers."""
        chosen, config = self._settings, self._vllm_config  # a setting replaces the estimate
        private_bytes = weights.private_bytes(config, on_host) if chosen.start_size is None else 0
        floor_bytes = weights.longest_request_bytes(config) if chosen.floor is None else 0
        self.wait_for_room(memory, private_bytes, floor_bytes, on_host)
