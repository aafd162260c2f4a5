"""An account: the worker's side of the ledger.

Each part of it has a module: `membership` (slot, lock, the worker's own fields), `applied_controls` (limit,
floor, weight), `start_queue`, `leasing` (promises) and `holdings` (memory that exists).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from typing import Self

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.errors import InvariantError, LedgerError
from kvcached_core.ledger.applied_controls import AppliedControls
from kvcached_core.ledger.file.doorbells import drain_bell
from kvcached_core.ledger.file.layout import CONTROLS, OWNER_WORDS
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.holdings import Holdings
from kvcached_core.ledger.leasing import Leasing
from kvcached_core.ledger.membership import Membership
from kvcached_core.ledger.start_queue import StartQueue, Turn


class Account:
    """One worker's account at one device. Thread-safe. Made by `attach`; sizes are bytes of this rank."""

    def __init__(self, membership: Membership, keep_ms: int) -> None:
        self.granule_bytes = 0  # of one granule on this rank; 0 before describe()
        self._membership = membership
        self._own = membership.own
        self._slot = membership.slot
        self._controls = AppliedControls(membership)
        self._queue = StartQueue(membership)
        self._leasing = Leasing(membership, self._controls, self._queue, keep_ms)
        self._holdings = Holdings(membership)

    @classmethod
    def attach(cls, runtime: Runtime, device: DeviceIdentity, capacity_bytes: int, headroom_bytes: int, *,
               instance: str, rank: int, name: str, engine: str = "", model: str = "",
               limit_bytes: int | None = None, floor_bytes: int = 0, weight: int = 100,
               keep_seconds: float = 1.0,
               clock: Callable[[], float] = time.monotonic,
               sleep: Callable[[float], None] = time.sleep) -> Self:  # fmt: skip
        """Claim a slot in the device's ledger, which is made if there is none.

        Without `limit_bytes` the limit is the device. For `keep_seconds`, memory that this engine waited for
        and its requests need can be reclaimed only for another engine's floor. Slots of the dead are freed
        first. If another living instance has this name, the engine is called `name-2`. Raises CapacityError
        if the floors no longer fit (I3), LedgerError if the ledger cannot be used, BusyError.
        """
        if not instance or len(instance.encode()) > 64 or "\0" in instance:
            raise LedgerError(f"instance id {instance!r}: expected 1 to 64 bytes of utf-8")
        own = dict.fromkeys((field for field in OWNER_WORDS if not field.endswith("claim")), 0)
        limit = capacity_bytes if limit_bytes is None else limit_bytes
        own |= {"rank": rank, "worker_pid": os.getpid()}
        for control, value in zip(CONTROLS, (limit, floor_bytes, weight), strict=True):
            own[f"{control}_applied"] = value
        texts = {"instance": instance, "engine": engine, "model": model}
        membership = Membership(runtime, device, own, texts, clock, sleep)
        account = cls(membership, round(keep_seconds * 1000))
        membership.join(name, capacity_bytes, headroom_bytes)
        return account

    def detach(self) -> None:
        """Leave the ledger; may be repeated. Never fails because the lock is busy.

        Raises InvariantError while anything is leased: memory that may exist is counted until the process
        ends.
        """
        if self.leased_bytes and self.fileno() >= 0:
            raise InvariantError(f"detach() with {self.leased_bytes} bytes leased")
        self._leasing.close()
        self._membership.leave()

    # -- the slot ----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The engine's name for tools."""
        return self._membership.name

    @property
    def device(self) -> DeviceIdentity:
        return self._membership.device

    @property
    def ledger_path(self) -> str:
        """The file that engines on this device share."""
        return str(self._membership.folder.ledger)

    @property
    def device_key(self) -> str:
        """A name of the device that is unique among all machines and the same for all engines on it."""
        return f"{self.device.uuid} {self._slot.file.header.generation}"

    @property
    def slot(self) -> int:
        """The number of this worker's slot."""
        return self._slot.index

    @property
    def capacity_bytes(self) -> int:
        """Memory of the device that engines share, as its ledger states it."""
        return self._membership.capacity_bytes

    def fileno(self) -> int:
        """Return the doorbell to poll; always the same number."""
        return self._slot.bell_fd

    def drain(self) -> None:
        """Empty the doorbell."""
        drain_bell(self._slot.bell_fd)

    # -- set by tools and the scheduler ------------------------------------------------------------------

    @property
    def limit_bytes(self) -> int:
        """The limit that this worker goes by."""
        return self._own["limit_applied"]

    @property
    def floor_bytes(self) -> int:
        """Memory that this worker can always get back."""
        return self._own["floor_applied"]

    @property
    def wanted_bytes(self) -> int:
        """Bytes that the scheduler wants leased in all, capped by how far the other ranks are."""
        return self._leasing.wanted_bytes

    @property
    def created_most(self) -> int:
        """Created granules that the scheduler may use; the rest is to be withdrawn. 0: it may use all."""
        return self._slot.get("created_most")

    def acknowledge(self) -> None:
        """Apply the values that tools set, and rejoin a ledger that was lost. Never waits for the lock."""
        self._controls.acknowledge()

    # -- starting ----------------------------------------------------------------------------------------

    @property
    def private_peak_bytes(self) -> int:
        """Most memory that this process may use outside its KV cache, as last stated."""
        return self._own["private_peak_bytes"]

    def set_private_peak(self, peak_bytes: int) -> None:
        """State the most memory this process may use outside its KV cache; others leave that much free."""
        with self._membership.mutex:
            self._membership.put("private_peak_bytes", peak_bytes)

    def set_floor_bytes(self, floor_bytes: int) -> None:
        """Set this worker's floor. Raises CapacityError if the floors no longer fit (I3), BusyError."""
        self._queue.set_floor(floor_bytes)

    def ask_to_start(self, private_bytes: int, floor_bytes: int, memory: MemoryInfo) -> Turn:
        """Claim memory outside the KV cache, and a floor; call again until the engine is admitted.

        Until then other engines are asked to give memory back, and get no more of it. Once admitted, nobody
        else is granted the memory. An engine that does not call for a second, stopped or dead, loses its
        place. Raises CapacityError if the claim can never fit beside the floors of others, BusyError.
        """
        return self._queue.ask(private_bytes, floor_bytes, memory)

    def ask_no_more(self) -> None:
        """Withdraw a claim that was not admitted."""
        self._queue.withdraw()

    # -- memory ------------------------------------------------------------------------------------------

    @property
    def leased_bytes(self) -> int:
        return self._own["leased_bytes"]

    @property
    def ready_bytes(self) -> int:
        return self._own["ready_bytes"]

    def grow_with(self, ranks: Collection[int]) -> None:
        """From now on lease in step with the engine's other `ranks` on this machine, all described already.

        Raises LedgerError naming the ranks that were not found.
        """
        self._leasing.grow_with(ranks)

    def describe(self, *, page_bytes: int, granule_bytes: int, granule_count: int, blocks_per_granule: int,
                 block_count: int, stride_bytes: int) -> None:  # fmt: skip
        """Write the geometry, before the first lease."""
        self._holdings.describe(
            page_bytes=page_bytes, granule_bytes=granule_bytes, granule_count=granule_count,
            blocks_per_granule=blocks_per_granule, block_count=block_count, stride_bytes=stride_bytes,
        )  # fmt: skip
        self.granule_bytes = granule_bytes

    def lease(self, want_bytes: int, memory: MemoryInfo) -> int:
        """Promise up to `want_bytes` more; return the bytes granted: whole granules, perhaps 0.

        Bytes that are not granted are recorded as demand, and engines above their share are asked to give
        memory back; each rings this worker when it does. `memory` is read before the lock is taken, so it may
        be old: creating a handle may still fail, and then the promise is given back.
        Raises BusyError, and then nothing has changed.
        """
        if self.granule_bytes == 0:
            raise InvariantError("lease() before describe()")
        if want_bytes <= 0:
            self._leasing.refuse(0)
            return 0
        return self._leasing.lease(want_bytes, memory)

    def refuse(self, unmet_bytes: int) -> None:
        """Record demand that could not be met; 0 if there is none."""
        self._leasing.refuse(unmet_bytes)

    def created(self, granules: int) -> None:
        """Count `granules` more that have handles.

        The scheduler is rung once all that is promised exists: one that has requests looks by itself.
        """
        self._holdings.created(granules)

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0,
                  granules_withdrawn: int = 0) -> None:  # fmt: skip
        """Give back promises that the driver could not keep, and granules whose handles are freed.

        Withdrawn granules no longer count as created: see `created_most`. The lock is taken if it is free:
        then a worker that waits for memory has recorded its demand and is rung, or sees the bytes. If it is
        busy, that worker's timer finds them.
        """
        self._holdings.give_back(bytes_never_ready, granules_released, granules_withdrawn)

    def recount(self, granules: int) -> None:
        """Count `granules` more as created and as released; nothing that exists changes."""
        self._holdings.recount(granules)

    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0,
                map_times: Sequence[int] = ()) -> None:  # fmt: skip
        """Show the bytes that are mapped and those used outside the KV cache.

        `maps` and `unmaps` are granules since the last call; `map_times` are the fields of the histogram of
        all maps so far.
        """
        self._holdings.publish(mapped_bytes, private_now_bytes, maps, unmaps, map_times)

    def check(self) -> None:
        """Raise InvariantError unless I2 holds and the ledger, if it is there, shows these numbers."""
        self._holdings.check()
