"""An owner of layout 1.0, which writes the fields up to `busy`, or of 1.1, which writes `reclaims` too."""

from __future__ import annotations

import fcntl
import os
import struct

from kvcached_core.ledger import Runtime
from kvcached_core.ledger.file import layout, storage
from kvcached_core.ledger.file.doorbells import make_bell
from kvcached_core.ledger.file.layout import FIRST_CLAIM, FREE, HEADER_AT, WORD
from kvcached_core.ledger.file.lock import LedgerLock
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.ledger.policy.grant import Promise, room
from tests.ledger.helpers import CAPACITY, GRANULE

_NAMES = [field.name for field in layout.SLOT]
_FIELDS = [layout.SLOT[: _NAMES.index(mark)] for mark in (layout.MINOR_1, layout.MINOR_2)]  # by minor


def make_old_file(runtime: Runtime) -> None:
    """Put a ledger of minor 0 in place."""
    folder = runtime.device("host")
    folder.make()
    storage.make_ledger(folder.ledger, 0o600, "host", CAPACITY, 0, unwritten=set())
    with folder.ledger.open("r+b") as file:
        file.seek(HEADER_AT["minor"] * WORD)
        file.write(struct.pack("<Q", 0))


class OldOwner:
    """Claims, leases and leaves as the older version does; sizes are granules."""

    def __init__(self, runtime: Runtime, instance: str, minor: int = 0) -> None:
        self._fields = _FIELDS[minor]
        self._folder = folder = runtime.device("host")
        self._lock = LedgerLock(folder.lock)
        with self._lock.held():
            self._file = file = LedgerFile(folder.ledger)
            self.slot = next(s for s in file.slots if file.get(s, "claim") == FREE and not folder.alive(s))
            self._owner_fd = os.open(folder.owner(self.slot), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._owner_fd, fcntl.LOCK_EX)
            make_bell(folder.worker_bell(self.slot), 0o600)
            make_bell(folder.engine_bell(self.slot), 0o600)
            for field in self._fields[1:]:
                if field.text_bytes:
                    text = instance if field.name in ("instance", "name") else ""
                    file.set_text(self.slot, field.name, text)
                else:
                    self.put(field.name, 0)
            for name in ("limit_wanted", "limit_applied", "ceiling_bytes"):
                self.put(name, CAPACITY)
            self.put("weight_wanted", 100)
            self.put("granule_bytes", GRANULE)
            claim = FIRST_CLAIM + int.from_bytes(os.urandom(7), "little")
            if minor:
                self.put(layout.MINOR_1, claim)
            file.set(self.slot, "claim", claim)

    def put(self, name: str, value: int) -> None:
        assert any(field.name == name for field in self._fields)
        self._file.set(self.slot, name, value)

    def lease(self, want: int) -> int:
        """Return the granules granted: first come, first served."""
        with self._lock.held():
            file = self._file
            taken = [slot for slot, claim in enumerate(file.claims()) if claim != FREE]
            promises = [Promise(*(file.get(slot, name) for name in Promise._fields)) for slot in taken]
            leased = file.get(self.slot, "leased_bytes")
            there = room(leased, CAPACITY, promises, CAPACITY, 0, CAPACITY)
            least = max(0, min(want * GRANULE, there.limit_bytes, there.of_device))
            got = least // GRANULE * GRANULE
            self.put("demand_bytes", want * GRANULE - got)
            self.put("leased_bytes", leased + got)
            self.put("ready_bytes", leased + got)
        return got // GRANULE

    def give_back(self, granules: int) -> None:
        left = self._file.get(self.slot, "leased_bytes") - granules * GRANULE
        self.put("ready_bytes", left)
        self.put("leased_bytes", left)

    def leave(self) -> None:
        self.put("claim", FREE)
        self._folder.remove(self.slot)
        self.close()

    def close(self) -> None:
        """Close the files, as the death of the process would."""
        os.close(self._owner_fd)
        self._file.close()
