"""A worker's membership in the ledger of one device: its slot, the lock, and the fields that it owns.

The worker's own numbers are the truth and the file repeats them. If the file or the slot is lost, they are
written again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.errors import BusyError, LedgerError
from kvcached_core.ledger.file.layout import ANY_WORDS, CONTROLS, ENGINE_WORDS, FREE, UNWRITTEN
from kvcached_core.ledger.file.lock import BOUND_SECONDS, LedgerLock
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.ledger.history import Reporter
from kvcached_core.ledger.naming import choose_name
from kvcached_core.ledger.owned_slot import OwnedSlot, open_ledger, ring_waiting, sweep
from kvcached_core.ledger.policy import grant
from kvcached_core.units import format_size

_log = logging.getLogger(__name__)
_JOIN_BOUND_SECONDS = 10.0  # 64 workers may start in the same second


class Membership:
    """One worker's slot in the ledger of one device. `own` are the fields that only this worker writes."""

    def __init__(self, runtime: Runtime, device: DeviceIdentity, own: dict[str, int], texts: dict[str, str],
                 clock: Callable[[], float], sleep: Callable[[float], None]) -> None:  # fmt: skip
        self.runtime = runtime
        self.device = device
        self.folder = runtime.device(device.uuid)
        self.lock = LedgerLock(self.folder.lock, runtime.file_mode, clock, sleep)
        self.mutex = threading.RLock()
        self.own = own
        self.texts = texts
        self.slot = OwnedSlot(self.folder)
        self.capacity_bytes = self.headroom_bytes = 0
        self.reporter = Reporter(self.folder, lambda: self.name, lambda: self.slot.index)
        self._name_lock = LedgerLock(runtime.lock, runtime.file_mode, clock, sleep)
        self._clock = clock

    @property
    def name(self) -> str:
        return self.texts["name"]

    def now_ms(self) -> int:
        """Return the milliseconds of the monotonic clock, which are never 0."""
        return int(self._clock() * 1000) + 1

    # -- joining and leaving -----------------------------------------------------------------------------

    def join(self, name: str, capacity_bytes: int, headroom_bytes: int) -> None:
        """Choose a name and claim a slot; see Account.attach."""
        try:
            self.folder.make()
            with self._name_lock.held(_JOIN_BOUND_SECONDS):
                self.texts["name"] = choose_name(self.runtime, name, self.texts["instance"])
                with self.lock.held(_JOIN_BOUND_SECONDS):
                    self._claim(capacity_bytes, headroom_bytes)
        except BaseException as error:
            self.slot.close()
            if isinstance(error, OSError):
                raise LedgerError(f"cannot use the ledger in {self.folder.path}: {error}") from error
            raise

    def _claim(self, capacity_bytes: int, headroom_bytes: int) -> None:
        """Claim the first slot; the lock is held."""
        file = open_ledger(self.folder, self.device.uuid, capacity_bytes, headroom_bytes)
        try:
            sweep(self.folder, file)
            self.capacity_bytes = file.header.capacity_bytes
            self.headroom_bytes = file.header.headroom_bytes
            if self.capacity_bytes != capacity_bytes:
                _log.warning(
                    "ledger %s keeps the capacity of the engines that use it, %s, instead of %s",
                    self.folder.path, format_size(self.capacity_bytes), format_size(capacity_bytes),
                )  # fmt: skip
            self._check_key_and_floor(file)
            limit = min(self.own["limit_applied"], self.capacity_bytes)
            self.own |= {"limit_applied": limit, "ceiling_bytes": limit}
            self.slot.take(file, self._fields(), self.texts)
        except BaseException:
            file.close()
            raise

    def _check_key_and_floor(self, file: LedgerFile) -> None:
        key, rows = (self.texts["instance"], self.own["rank"]), file.rows()
        for index, row in rows.items():
            if row["claim"] != UNWRITTEN and (file.get_text(index, "instance"), row["rank"]) == key:
                raise LedgerError(
                    f"rank {key[1]} of instance {key[0]} is attached to {self.device.uuid} already"
                )
        floor = self.own["floor_applied"]
        grant.check_floors(rows.values(), [floor], self.capacity_bytes, self.device.uuid)

    def _fields(self) -> dict[str, int]:
        """Return the fields to claim a slot with.

        They are the worker's own, the tools' as last acknowledged, and the scheduler's as in the slot before.
        """
        fields = dict(self.own)
        for control in CONTROLS:
            fields[f"{control}_wanted"] = self.own[f"{control}_applied"]
            fields[f"{control}_wanted_generation"] = self.own[f"{control}_applied_generation"]
        fields |= dict.fromkeys((*ENGINE_WORDS, *ANY_WORDS), 0)
        if self.slot.claim != FREE:
            fields |= {name: self.slot.get(name) for name in ENGINE_WORDS}
        return fields

    def leave(self) -> None:
        """Free the slot; may be repeated. Never fails because the lock is busy."""
        with self.mutex:
            if self.slot.bell_fd < 0:
                return
            with self.lock.held_if_possible() as held:
                self.slot.leave()
                if held:
                    self._sweep_and_ring()

    def _sweep_and_ring(self) -> None:
        """Free the slots of the dead, and ring the workers that wait for memory; the lock is held."""
        with contextlib.suppress(FileNotFoundError, LedgerError):
            file = LedgerFile(self.folder.ledger)
            sweep(self.folder, file)
            ring_waiting(self.folder, file)
            file.close()

    # -- while it lasts ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusive(self, bound_seconds: float = BOUND_SECONDS) -> Iterator[LedgerFile]:
        """Hold the lock with the slot known to be in the file; observers are told after it is released.

        Raises BusyError, also if the ledger was lost and cannot be made again now. The worker cannot grow
        until it can.
        """
        self.slot.require_own_process()
        with self.mutex, contextlib.ExitStack() as stack:
            try:
                if not self.folder.path.exists():
                    self.folder.make()
                stack.enter_context(self.lock.held(bound_seconds))
                self._rejoin_if_lost()
            except BusyError:
                raise
            except (OSError, LedgerError) as error:
                raise BusyError(f"cannot use the ledger in {self.folder.path} now: {error}") from error
            yield self.slot.file
        self.reporter.flush()

    def _rejoin_if_lost(self) -> None:
        """Claim a slot again if the ledger, the slot or its files were lost; the lock is held."""
        if self.slot.is_current():
            return
        _log.warning("the ledger in %s was removed or damaged: writing %s again", self.folder.path, self.name)
        file = self.slot.file
        if not file.is_current():
            file = open_ledger(
                self.folder, self.device.uuid, self.capacity_bytes, self.headroom_bytes, heal=True
            )
        self.slot.take(file, self._fields(), self.texts)
        self.slot.engine_bell.ring()
        ring_waiting(self.folder, file, self.slot.index)

    def put(self, name: str, value: int) -> None:
        """Set one of the worker's own fields."""
        self.own[name] = value
        self.slot.set(name, value)

    def add(self, name: str, count: int = 1) -> None:
        """Add to one of the worker's own fields."""
        if count:
            self.put(name, self.own[name] + count)
