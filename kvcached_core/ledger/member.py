"""A member of a ledger: one worker's place in it, which it keeps, or takes again if the files were lost.

The member's own numbers are the truth and the file mirrors them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.errors import BusyError, LedgerError
from kvcached_core.ledger.file.doorbells import drain_bell
from kvcached_core.ledger.file.layout import ANY_WORDS, CONTROLS, ENGINE_WORDS, FREE, OWNER_WORDS, UNHEARD
from kvcached_core.ledger.file.lock import BOUND_SECONDS, LedgerLock
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.ledger.history import Reporter
from kvcached_core.ledger.naming import choose_name
from kvcached_core.ledger.owned_slot import OwnedSlot, open_ledger, ring_waiting, sweep
from kvcached_core.ledger.policy import grant
from kvcached_core.units import format_size

_log = logging.getLogger(__name__)
_ATTACH_BOUND_SECONDS = 10.0  # 64 workers may start in the same second


class Member:
    """The place of one worker in the ledger of one device."""

    def __init__(self, runtime: Runtime, device: DeviceIdentity, own: dict[str, int], texts: dict[str, str],
                 clock: Callable[[], float], sleep: Callable[[float], None]) -> None:  # fmt: skip
        self.device = device
        self._runtime = runtime
        self._folder = runtime.device(device.uuid)
        self._lock = LedgerLock(self._folder.lock, runtime.file_mode, clock, sleep)
        self._name_lock = LedgerLock(runtime.lock, runtime.file_mode, clock, sleep)
        self._mutex = threading.RLock()
        self._own = own
        self._texts = texts
        self._seat = OwnedSlot(self._folder)
        self._capacity_bytes = self._headroom_bytes = 0
        self._clock = clock
        self._keep_ms = 0
        self._reporter = Reporter(self._folder, lambda: self.name, lambda: self.slot)

    @classmethod
    def attach(cls, runtime: Runtime, device: DeviceIdentity, capacity_bytes: int, headroom_bytes: int, *,
               instance: str, rank: int, name: str, engine: str = "", model: str = "",
               limit_bytes: int | None = None, floor_bytes: int = 0, weight: int = 100,
               keep_seconds: float = 1.0,
               clock: Callable[[], float] = time.monotonic,
               sleep: Callable[[float], None] = time.sleep) -> Self:  # fmt: skip
        """Take a slot of the device's ledger, which is made if there is none.

        `limit_bytes` None is the device. For `keep_seconds` what this engine waited for and got, and its
        requests need, goes to floors only. The dead are swept first. Another living instance of the same name
        makes this one `name-2`. Raises CapacityError if the floors no longer fit (I3), LedgerError if the
        ledger cannot be used, BusyError.
        """
        if not instance or len(instance.encode()) > 64 or "\0" in instance:
            raise LedgerError(f"instance id {instance!r}: expected 1 to 64 bytes of utf-8")
        own = dict.fromkeys((word for word in OWNER_WORDS if not word.endswith("claim")), 0)
        limit = capacity_bytes if limit_bytes is None else limit_bytes
        own |= {"rank": rank, "worker_pid": os.getpid()}
        for control, value in zip(CONTROLS, (limit, floor_bytes, weight), strict=True):
            own[f"{control}_applied"] = value
        member = cls(
            runtime, device, own, {"instance": instance, "engine": engine, "model": model}, clock, sleep
        )
        member._keep_ms = round(keep_seconds * 1000)
        try:
            member._folder.make()
            with member._name_lock.held(_ATTACH_BOUND_SECONDS):
                member._texts["name"] = choose_name(runtime, name, instance)
                with member._lock.held(_ATTACH_BOUND_SECONDS):
                    member._claim(capacity_bytes, headroom_bytes)
        except BaseException as error:
            member._seat.close()
            if isinstance(error, OSError):
                raise LedgerError(f"cannot use the ledger in {member._folder.path}: {error}") from error
            raise
        return member

    def _claim(self, capacity_bytes: int, headroom_bytes: int) -> None:
        """Take the first seat; the lock is held."""
        file = open_ledger(self._folder, self.device.uuid, capacity_bytes, headroom_bytes)
        try:
            sweep(self._folder, file)
            self._capacity_bytes, self._headroom_bytes = (
                file.header.capacity_bytes,
                file.header.headroom_bytes,
            )
            if self._capacity_bytes != capacity_bytes:
                _log.warning(
                    "ledger %s goes by the capacity of the engines already there, %s, not by %s",
                    self._folder.path, format_size(self._capacity_bytes), format_size(capacity_bytes),
                )  # fmt: skip
            self._check_key_and_floor(file)
            limit = min(self._own["limit_applied"], self._capacity_bytes)
            self._own |= {"limit_applied": limit, "ceiling_bytes": limit}
            self._seat.take(file, self._words(), self._texts)
        except BaseException:
            file.close()
            raise

    def _check_key_and_floor(self, file: LedgerFile) -> None:
        key, rows = (self._texts["instance"], self._own["rank"]), file.rows()
        for slot, row in rows.items():
            if row["claim"] != UNHEARD and (file.get_text(slot, "instance"), row["rank"]) == key:
                raise LedgerError(
                    f"rank {key[1]} of instance {key[0]} is attached to {self.device.uuid} already"
                )
        floor = self._own["floor_applied"]
        grant.check_floors(rows.values(), [floor], self._capacity_bytes, self.device.uuid)

    def _words(self) -> dict[str, int]:
        """Return the words to claim a slot with: one's own, the tools' as last acknowledged, the engine's."""
        words = dict(self._own)
        for control in CONTROLS:
            words[f"{control}_wanted"] = self._own[f"{control}_applied"]
            words[f"{control}_wanted_generation"] = self._own[f"{control}_applied_generation"]
        words |= dict.fromkeys((*ENGINE_WORDS, *ANY_WORDS), 0)
        if self._seat.claim != FREE:
            words |= {name: self._seat.get(name) for name in ENGINE_WORDS}
        return words

    def _secure(self) -> None:
        """Come back to the ledger if it, the slot or the files were lost; the lock is held."""
        if self._seat.is_current():
            return
        _log.warning(
            "the ledger in %s was removed or damaged: writing %s again", self._folder.path, self.name
        )
        file = self._seat.file
        if not file.is_current():
            file = open_ledger(
                self._folder, self.device.uuid, self._capacity_bytes, self._headroom_bytes, heal=True
            )
        self._seat.take(file, self._words(), self._texts)
        self._seat.engine_bell.ring()
        ring_waiting(self._folder, file, self._seat.slot)

    @contextlib.contextmanager
    def _exclusive(self, bound_seconds: float = BOUND_SECONDS) -> Iterator[LedgerFile]:
        """Hold the lock, with one's place in the ledger secured.

        What was reported under it is told after it. Raises BusyError, also if the ledger was lost and cannot
        be made again now: growth waits for it.
        """
        self._seat.require_own_process()
        with self._mutex, contextlib.ExitStack() as stack:
            try:
                if not self._folder.path.exists():
                    self._folder.make()
                stack.enter_context(self._lock.held(bound_seconds))
                self._secure()
            except BusyError:
                raise
            except (OSError, LedgerError) as error:
                raise BusyError(f"cannot use the ledger in {self._folder.path} now: {error}") from error
            yield self._seat.file
        self._reporter.flush()

    def _put(self, name: str, value: int) -> None:
        self._own[name] = value
        self._seat.set(name, value)

    def _add(self, name: str, count: int = 1) -> None:
        if count:
            self._put(name, self._own[name] + count)

    @property
    def name(self) -> str:
        """What tools call this engine."""
        return self._texts["name"]

    @property
    def ledger_path(self) -> str:
        """The file that engines on this device share."""
        return str(self._folder.ledger)

    @property
    def device_key(self) -> str:
        """The device among those of all machines: the same for all engines on it."""
        return f"{self.device.uuid} {self._seat.file.header.generation}"

    @property
    def slot(self) -> int:
        return self._seat.slot

    @property
    def capacity_bytes(self) -> int:
        """What the device holds, as its ledger says."""
        return self._capacity_bytes

    def fileno(self) -> int:
        """Return the bell to poll; always the same number."""
        return self._seat.bell_fd

    def drain(self) -> None:
        """Read what was rung."""
        drain_bell(self._seat.bell_fd)

    def detach(self) -> None:
        """Leave the ledger, with everything given back; may be repeated. Never fails for a busy lock."""
        with self._mutex:
            if self._seat.bell_fd < 0:
                return
            with self._lock.held_if_possible() as held:
                self._seat.leave()
                if held:
                    self._after_leaving()

    def _after_leaving(self) -> None:
        """Let those who are short know, and remove what the dead have left; the lock is held."""
        with contextlib.suppress(FileNotFoundError, LedgerError):
            file = LedgerFile(self._folder.ledger)
            sweep(self._folder, file)
            ring_waiting(self._folder, file)
            file.close()
