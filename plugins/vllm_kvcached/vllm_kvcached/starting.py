"""One rank's way into its device's ledger: a slot, its turn, and what it takes while it loads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvcached_core.config import Config
from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.driver.machine import Machine
from kvcached_core.errors import InvariantError
from kvcached_core.ledger import Account, Runtime, snapshot
from kvcached_core.start import CONTEXT_BYTES, engine_lives, in_device_order
from kvcached_core.turnstile import Loading, set_floor, wait_for_bell, wait_for_turn
from vllm_kvcached import nvml, weights
from vllm_kvcached.private_memory import PrivateMemory
from vllm_kvcached.ranks import gather
from vllm_kvcached.support import instance

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)


class Start:
    """What happens to a rank between its first line and its first step."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        settings: Config,
        rank: int,
        machine: Callable[[], MemoryInfo] = lambda: Machine().memory(),
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[int, float], None] = wait_for_bell,
        lives: Callable[[], bool] = engine_lives,
    ) -> None:
        """`machine` returns what the system has, whatever the engines on the host share of it."""
        self._vllm_config = vllm_config
        self._settings = settings
        self._rank = rank
        self._machine = machine
        self._clock = clock
        self._wait = wait
        self._lives = lives
        self._account: Account | None = None
        self._private: PrivateMemory | None = None
        self._loading: Loading | None = None
        self._capacity_bytes = 0
        self._admitted = False

    @property
    def account(self) -> Account:
        """The rank's account. Raises InvariantError before it is attached."""
        if self._account is None:
            raise InvariantError("the ledger is entered with the device")
        return self._account

    @property
    def private(self) -> PrivateMemory:
        """What the process takes outside its KV cache. Raises InvariantError before the device is open."""
        if self._private is None:
            raise InvariantError("the ledger is entered with the device")
        return self._private

    def limit_bytes(self, capacity_bytes: int) -> int:
        """Return the limit: as set, and not over vLLM's own --kv-cache-memory-bytes."""
        limit = min(self._settings.limit.of(capacity_bytes), capacity_bytes)
        explicit: int | None = self._vllm_config.cache_config.kv_cache_memory_bytes
        return min(limit, explicit) if explicit else limit

    # -- in this order -----------------------------------------------------------------------------------

    def make_room_for_context(self, local_rank: int) -> None:
        """Wait until a context fits on a device that other engines may have filled.

        Only NVML and their ledger can be asked: the driver makes a context.
        """
        uuid = nvml.uuid_of(local_rank)
        shared = [
            device for device in snapshot(self._runtime())
            if device.uuid == uuid and any(owner.live for owner in device.owners)
        ]  # fmt: skip
        if uuid is None or not shared:
            return
        self._account = self._attach(DeviceIdentity(uuid, ""), shared[0].capacity_bytes)
        self._wait_for_turn(lambda: nvml.memory_of(uuid), CONTEXT_BYTES, 0)

    def enter(
        self,
        device: torch.device,
        identity: DeviceIdentity,
        capacity_bytes: int,
        mapped_bytes: Callable[[], int],
    ) -> None:
        """Attach to the ledger of a device that is open, unless that is done, and show what is taken."""
        if self._account is not None and self._account.device.uuid != identity.uuid:
            self.close()
        if self._account is None:
            self._account = self._attach(identity, capacity_bytes)
        account, self._capacity_bytes = self._account, capacity_bytes
        self._private = PrivateMemory(device, identity.uuid, lambda: account.ready_bytes)
        self._loading = Loading(account, mapped_bytes, self._private_now)
        self._loading.start()

    def wait_for_room(self, memory: Callable[[], MemoryInfo], on_host: bool) -> None:
        """Return once what this rank will take is promised to it; the same of all other ranks.

        Raises CapacityError on all of them if one of them is refused.
        """
        account = self.account
        floor_bytes = self._floor_bytes()
        private_bytes = self._private_bytes(on_host, floor_bytes)
        account.set_private_peak(0)  # the context that was waited for is there
        in_device_order(
            account.device.uuid, lambda: self._wait_for_turn(memory, private_bytes, floor_bytes), gather
        )
        # What is there already was not asked for: counted in the peak first, it never looks like a part of
        # what is still to come.
        account.set_private_peak(private_bytes + self.private.measure())
        self._admitted = True

    def set_floor(self, floor_bytes: int) -> None:
        """Set the exact floor. Raises CapacityError with the numbers if it does not fit."""
        set_floor(self.account, floor_bytes, self._settings.start_seconds, self._clock)

    def end(self, activation_bytes: int) -> None:
        """All is loaded: from now on only the activations may still come."""
        self.stop()
        self.account.set_private_peak(self.private.measure() + activation_bytes)

    def stop(self) -> None:
        """Show nothing more of the loading; may be repeated."""
        if self._loading is not None:
            self._loading.stop()
            self._loading = None

    def close(self) -> None:
        """Leave the ledger, with all memory given back; may be repeated."""
        self.stop()
        account, self._account = self._account, None
        if account is not None:
            account.detach()

    # -- parts -------------------------------------------------------------------------------------------

    def _private_now(self) -> int:
        return self.private.measure() if self._admitted else 0

    def _wait_for_turn(self, memory: Callable[[], MemoryInfo], private_bytes: int, floor_bytes: int) -> None:
        seconds = self._settings.start_seconds
        wait_for_turn(self.account, memory, private_bytes, floor_bytes, seconds, self._clock, self._sleep)

    def _sleep(self, fd: int, seconds: float) -> None:
        self._wait(fd, seconds)
        if not self._lives():
            raise SystemExit("the engine of this worker has ended while it waited to start")

    def _floor_bytes(self) -> int:
        """Return the floor as far as it can be known before the geometry is."""
        capacity_bytes, floor = self._capacity_bytes, self._settings.floor
        if floor is not None:
            return floor.of(capacity_bytes)
        return min(weights.longest_request_bytes(self._vllm_config), self.limit_bytes(capacity_bytes))

    def _private_bytes(self, on_host: bool, floor_bytes: int) -> int:
        """Return what to claim outside the KV cache: on the host, what must come out of what is shared.

        The system's memory beyond what engines share is there for the processes themselves.
        """
        size = self._settings.start_size
        private_bytes = weights.private_bytes(self._vllm_config, on_host) if size is None else size.bytes
        if not on_host:
            return private_bytes
        capacity_bytes = self._capacity_bytes
        beside_bytes = max(0, self._machine().free_bytes - capacity_bytes)
        most_bytes = capacity_bytes - self._settings.headroom.of(capacity_bytes) - floor_bytes
        return max(0, min(private_bytes - beside_bytes, most_bytes))

    def _runtime(self) -> Runtime:
        return Runtime.open(self._settings.runtime_dir or None)

    def _attach(self, identity: DeviceIdentity, capacity_bytes: int) -> Account:
        chosen, model = self._settings, self._vllm_config.model_config
        served = model.served_model_name
        name = chosen.name or str(served[0] if isinstance(served, list) else served or model.model)
        return Account.attach(
            self._runtime(),
            identity,
            capacity_bytes,
            chosen.headroom.of(capacity_bytes),
            instance=instance(self._vllm_config),
            rank=self._rank,
            name=name.rstrip("/").rpartition("/")[2],
            engine="vllm",
            model=str(model.model),
            limit_bytes=self.limit_bytes(capacity_bytes),
            weight=chosen.weight,
            keep_seconds=chosen.keep_seconds,
        )
