"""The start of one rank: attach to its device's ledger, wait for memory, and report what loading takes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvcached_core.config import Config
from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.driver.machine import Machine
from kvcached_core.errors import CapacityError, ConfigError, InvariantError, KVCachedError
from kvcached_core.ledger import Account, Runtime, snapshot
from kvcached_core.startup.admission import LoadingReporter, set_floor, wait_for_admission, wait_for_doorbell
from kvcached_core.startup.private_memory import PrivateMemory
from kvcached_core.units import GIB, format_size

CONTEXT_BYTES = GIB  # a CUDA context (0.5 GiB on an H100), communication buffers, the model runner's buffers

Gather = Callable[[Any], list[Any]]


class RankIdentity(NamedTuple):
    """Identity of a rank: `instance` is unique to its engine, `name` is the name that tools show."""

    engine: str
    instance: str
    rank: int
    name: str
    model: str


def engine_lives() -> bool:
    """Say whether the engine's main process lives, which is the parent. True in the main process itself."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def in_device_order(device: str, wait: Callable[[], None], gather: Gather) -> None:
    """Call `wait` on one device after the other, in the same order in all engines.

    Two engines that want the same devices therefore cannot each hold one and wait for the other. `device`
    is unique over all machines. `gather` returns the values of all ranks. If `wait` raises on one rank, all
    ranks raise.
    """
    for current in sorted(set(gather(device))):
        refusal: KVCachedError | None = None
        if current == device:
            try:
                wait()
            except KVCachedError as error:
                refusal = error
        refused = [text for text in gather(str(refusal) if refusal else None) if text]
        if refused:
            raise refusal or CapacityError(refused[0])


class RankStartup:
    """Takes a rank from the start of its process to its first step, and through sleep and waking."""

    def __init__(
        self,
        settings: Config,
        rank: RankIdentity,
        gather: Gather,
        machine: Callable[[], MemoryInfo] = lambda: Machine().memory(),
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[int, float], None] = wait_for_doorbell,
        lives: Callable[[], bool] = engine_lives,
    ) -> None:
        """`machine` returns the whole machine's memory; KV caches in host memory share a part of it."""
        self._settings = settings
        self._rank = rank
        self._gather = gather
        self._machine = machine
        self._clock = clock
        self._wait = wait
        self._lives = lives
        self._account: Account | None = None
        self._private: PrivateMemory | None = None
        self._reporter: LoadingReporter | None = None
        self._capacity_bytes = 0
        self._admitted = False
        self._bytes_to_wake: int | None = None  # outside the KV cache; set while the rank sleeps

    @property
    def account(self) -> Account:
        """The rank's account. Raises InvariantError before it is attached."""
        if self._account is None:
            raise InvariantError("the ledger is entered with the device")
        return self._account

    @property
    def private(self) -> PrivateMemory:
        """The process's memory outside its KV cache. Raises InvariantError before the device is open."""
        if self._private is None:
            raise InvariantError("the ledger is entered with the device")
        return self._private

    def limit_bytes(self) -> int:
        """Return this rank's limit in bytes, at most the device's size. Raises InvariantError before enter().

        A plugin whose engine has an option for the limit overrides this method.
        """
        capacity_bytes = self._capacity_bytes
        if capacity_bytes <= 0:
            raise InvariantError("the ledger is entered with the device")
        return min(self._settings.limit.of(capacity_bytes), capacity_bytes)

    # -- called in this order -----------------------------------------------------------------------------

    def make_room_for_context(self, uuid: str, memory: Callable[[], MemoryInfo]) -> None:
        """Wait until a CUDA context fits on a device that others may have filled. Raises CapacityError.

        Returns at once if no other engine uses the device. `memory` must not create a CUDA context.
        """
        shared = [
            device for device in snapshot(self._runtime())
            if device.uuid == uuid and any(owner.live for owner in device.owners)
        ]  # fmt: skip
        if not shared:
            return
        self._capacity_bytes = shared[0].capacity_bytes
        self._account = self._attach(DeviceIdentity(uuid, ""))
        self._wait_for_admission(memory, CONTEXT_BYTES, 0)

    def enter(
        self,
        identity: DeviceIdentity,
        capacity_bytes: int,
        private: PrivateMemory,
        mapped_bytes: Callable[[], int],
    ) -> None:
        """Attach to the ledger of an open device, unless attached, and start to report memory use."""
        if self._account is not None and self._account.device.uuid != identity.uuid:
            self.close()
        self._capacity_bytes = capacity_bytes
        if self._account is None:
            self._account = self._attach(identity)
        self._private = private
        self._reporter = LoadingReporter(self._account, mapped_bytes, self._reported_private_bytes)
        self._reporter.start()

    def wait_for_room(
        self, memory: Callable[[], MemoryInfo], private_bytes: int, floor_bytes: int, on_host: bool
    ) -> None:
        """Wait until the ledger has promised every rank of this engine the memory that it will take.

        `private_bytes`, outside the KV cache, and `floor_bytes` are estimates. Raises CapacityError on all
        ranks if one of them is refused.
        """
        account, chosen = self.account, self._settings
        floor = chosen.floor
        floor_bytes = (
            min(floor_bytes, self.limit_bytes()) if floor is None else floor.of(self._capacity_bytes)
        )
        if chosen.start_size is not None:
            private_bytes = chosen.start_size.bytes
        if on_host:
            private_bytes = self._claim_on_host(private_bytes, floor_bytes)
        account.set_private_peak(0)  # the context exists now
        in_device_order(
            account.device_key,
            lambda: self._wait_for_admission(memory, private_bytes, floor_bytes),
            self._gather,
        )
        # The claim does not include memory taken before now. The peak does: peak - measured = still to come.
        account.set_private_peak(private_bytes + self.private.measure())
        self._admitted = True

    def set_floor(self, floor_bytes: int) -> None:
        """Set the exact floor. Raises CapacityError with the numbers if it does not fit."""
        set_floor(self.account, floor_bytes, self._settings.start_seconds, self._clock)

    def end(self, activation_bytes: int) -> None:
        """Note that loading has ended: from now on the process takes at most `activation_bytes` more."""
        self.stop()
        self.account.set_private_peak(self.private.measure() + activation_bytes)

    def note_asleep(self) -> None:
        """Offer other engines the memory outside the KV cache that this process has freed."""
        if self._bytes_to_wake is None:
            self._bytes_to_wake = self.account.private_peak_bytes
        self.account.set_private_peak(self.private.measure())

    def wait_to_wake(self, memory: Callable[[], MemoryInfo]) -> None:
        """Wait until the ledger has promised every rank its floor and the memory that note_asleep() offered.

        If one rank is refused, all ranks raise CapacityError and no promise remains.
        """
        account = self.account
        try:
            in_device_order(account.device_key, lambda: self._wait_to_wake(memory), self._gather)
        except BaseException:
            account.ask_no_more()
            if self._bytes_to_wake is not None:
                account.set_private_peak(self.private.measure())
            raise

    def note_awake(self) -> None:
        """Note that the rank is awake: its process has taken the memory that wait_to_wake() claimed."""
        self.private.measure()
        self._bytes_to_wake = None

    def stop(self) -> None:
        """Stop reporting the loading. A second call does nothing."""
        if self._reporter is not None:
            self._reporter.stop()
            self._reporter = None

    def close(self) -> None:
        """Leave the ledger, which ends all leases of this rank. A second call does nothing."""
        self.stop()
        account, self._account = self._account, None
        if account is not None:
            account.detach()

    # -- parts -------------------------------------------------------------------------------------------

    def _reported_private_bytes(self) -> int:
        return self.private.measure() if self._admitted else 0

    def _wait_to_wake(self, memory: Callable[[], MemoryInfo]) -> None:
        if self._bytes_to_wake is None:
            return
        account, seconds = self.account, self._settings.start_seconds
        wait_for_admission(account, memory, self._bytes_to_wake, account.floor_bytes, seconds, self._clock,
                      self._sleep, "wake up")  # fmt: skip

    def _wait_for_admission(
        self, memory: Callable[[], MemoryInfo], private_bytes: int, floor_bytes: int
    ) -> None:
        seconds = self._settings.start_seconds
        wait_for_admission(
            self.account, memory, private_bytes, floor_bytes, seconds, self._clock, self._sleep
        )

    def _sleep(self, fd: int, seconds: float) -> None:
        self._wait(fd, seconds)
        if not self._lives():
            raise SystemExit("the engine of this rank has ended while it waited to start")

    def _claim_on_host(self, private_bytes: int, floor_bytes: int) -> int:
        """Return the part of a claim that must come from the host memory set aside for KV caches.

        The rest of the claim comes from the machine's other memory.
        """
        beside_bytes = max(0, self._machine().free_bytes - self._capacity_bytes)
        most_bytes = self._capacity_bytes - self._headroom_bytes() - floor_bytes
        return max(0, min(private_bytes - beside_bytes, most_bytes))

    def _headroom_bytes(self) -> int:
        """Return the device's bytes that are never leased. Raises ConfigError if that is the whole device."""
        headroom_bytes = self._settings.headroom.of(self._capacity_bytes)
        if headroom_bytes >= self._capacity_bytes:
            raise ConfigError(
                f"headroom (KVCACHED_HEADROOM) of {format_size(headroom_bytes)}: expected less than the "
                f"{format_size(self._capacity_bytes)} of the device; lower it or, on the host, raise "
                "host_capacity (KVCACHED_HOST_CAPACITY)"
            )
        return headroom_bytes

    def _runtime(self) -> Runtime:
        return Runtime.open(self._settings.runtime_dir or None)

    def _attach(self, identity: DeviceIdentity) -> Account:
        chosen, rank = self._settings, self._rank
        return Account.attach(
            self._runtime(),
            identity,
            self._capacity_bytes,
            self._headroom_bytes(),
            instance=rank.instance,
            rank=rank.rank,
            name=(chosen.name or rank.name).rstrip("/").rpartition("/")[2],
            engine=rank.engine,
            model=rank.model,
            limit_bytes=self.limit_bytes(),
            weight=chosen.weight,
            keep_seconds=chosen.keep_seconds,
        )
