"""The slot that a worker owns, and the files that prove the worker alive; sweeping the slots of the dead.

Everything here that gives a slot to an owner, or takes it away, runs under the ledger's lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping

from kvcached_core.errors import InvariantError, LedgerError
from kvcached_core.ledger.file.descriptors import close_private, open_private
from kvcached_core.ledger.file.doorbells import Ringer, make_bell, open_bell, ring
from kvcached_core.ledger.file.layout import FIRST_CLAIM, FREE, MINOR_1, MINOR_2, UNWRITTEN
from kvcached_core.ledger.file.runtime import DeviceFolder, FolderState
from kvcached_core.ledger.file.storage import (
    LedgerFile,
    OtherVersionError,
    fresh_path,
    make_ledger,
    write_point,
)


def open_ledger(folder: DeviceFolder, uuid: str, capacity_bytes: int, headroom_bytes: int,
                heal: bool = False) -> LedgerFile:  # fmt: skip
    """Map the ledger of a device; make it if there is none. The lock is held.

    A file that cannot be used is made anew if no living worker uses it. With `heal` it is made anew also
    then: the caller used it while it was whole, so the other workers use the same layout and will write their
    slots again. Raises LedgerError.
    """
    living = {slot for slot in folder.slots_with_files() if folder.alive(slot)}
    try:
        file = LedgerFile(folder.ledger)
        if living or (file.header.capacity_bytes, file.header.headroom_bytes) == (
            capacity_bytes,
            headroom_bytes,
        ):
            return file
        file.close()  # no worker is left that uses the old numbers
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LedgerError(f"cannot open {folder.ledger}: {error.strerror}") from error
    except LedgerError as error:
        if living and (not heal or isinstance(error, OtherVersionError)):
            raise LedgerError(
                f"{folder.ledger}: {error}; {len(living)} engine workers that use it are alive "
                f"(slots {', '.join(map(str, sorted(living)))}): end them, and the next engine makes it anew"
            ) from error
    make_ledger(folder.ledger, folder.file_mode, uuid, capacity_bytes, headroom_bytes, unwritten=living)
    for slot in living:
        ring(folder.worker_bell(slot))
    return LedgerFile(folder.ledger)


def sweep(folder: DeviceFolder, file: LedgerFile) -> int:
    """Free the slots of the dead and remove their files; return how many slots were freed. The lock is held.

    A worker's memory is freed when it dies, so its slot may be freed before its files are removed.
    """
    freed = 0
    fresh_path(folder.ledger).unlink(missing_ok=True)  # its maker has died: a living one holds the lock
    with_files = folder.slots_with_files()
    for slot in sorted(with_files.union(slot for slot, claim in enumerate(file.claims()) if claim != FREE)):
        if folder.alive(slot):
            continue
        if slot in file.slots and file.get(slot, "claim") != FREE:
            file.set(slot, "claim", FREE)
            freed += 1
        write_point("unlink")
        folder.remove(slot)
    return freed


def ring_waiting(folder: DeviceFolder, file: LedgerFile, but_slot: int = -1) -> None:
    """Ring the workers that lack memory, that wait to start, or that have yet to write a new file."""
    for slot, claim in enumerate(file.claims()):
        if claim == FREE or slot == but_slot:
            continue
        if claim == UNWRITTEN or file.get(slot, "demand_bytes") or file.get(slot, "starting_bytes"):
            ring(folder.worker_bell(slot))


class OwnedSlot:
    """One claimed slot. `bell_fd` stays the same number when the files have to be made again."""

    def __init__(self, folder: DeviceFolder) -> None:
        self.folder = folder
        self.index = -1
        self.claim = FREE
        self.bell_fd = -1
        self.engine_bell = Ringer(folder.engine_bell(-1))
        self._pid = os.getpid()
        self._owner_fd = -1
        self._file: LedgerFile | None = None
        self._found_current_in: FolderState | None = None

    @property
    def file(self) -> LedgerFile:
        assert self._file is not None, "no slot is claimed"
        return self._file

    def is_current(self) -> bool:
        """Return whether the ledger, the claim and the slot's files are still this worker's.

        The files are looked at again only after a name in their folder was made, renamed or removed.
        """
        file, folder = self._file, self.folder.state()
        if file is None or not file.is_intact() or file.get(self.index, "claim") != self.claim:
            return False
        if folder is not None and folder == self._found_current_in:
            return True
        is_current = file.is_current() and self._files_are_current()
        self._found_current_in = folder if is_current else None
        return is_current

    def require_own_process(self) -> None:
        """Raise InvariantError in a forked child: it owns nothing of its parent's memory."""
        if os.getpid() != self._pid:
            raise InvariantError("an account was used in a forked child: attach one there")

    def set(self, name: str, value: int) -> None:
        """Write a field of the slot, unless the slot was lost: then only the owner's own numbers count."""
        self.require_own_process()
        file = self.file
        if file.is_whole() and file.get(self.index, "claim") == self.claim:
            file.set(self.index, name, value)

    def get(self, name: str) -> int:
        """Read a field of the slot; 0 from a file that was cut."""
        return self.file.get(self.index, name) if self.file.is_whole() else 0

    def take(self, file: LedgerFile, words: Mapping[str, int], texts: Mapping[str, str]) -> None:
        """Claim a slot of `file` with these contents, and free the one held before. The lock is held.

        The owner file is locked first, then the contents are written, and the claim last: a death in between
        leaves a free slot. The old slot, in this file or in one that was deleted, is freed after that, so
        for a moment both count. Raises LedgerError if all slots are taken.
        """
        old_file, old_index, same_file = self._file, self.index, self._file is file
        if self._owner_fd < 0 or not self._files_are_current() or self.index not in file.slots:
            slot = self._free_slot(file)
            self._make_files(slot)
        else:
            slot = self.index
        claim = FIRST_CLAIM + int.from_bytes(os.urandom(7), "little")
        for name, text in texts.items():
            file.set_text(slot, name, text)
        for name, value in words.items():
            file.set(slot, name, value)
        file.set(slot, MINOR_1, claim)
        file.set(slot, MINOR_2, claim)
        file.set(slot, "claim", claim)
        old_claim, self._file, self.index, self.claim = self.claim, file, slot, claim
        if old_file is None or (same_file and slot == old_index):
            return
        if old_file.is_whole() and old_file.get(old_index, "claim") == old_claim:
            old_file.set(old_index, "claim", FREE)
        if not same_file:
            old_file.close()

    def leave(self) -> None:
        """Free the slot and remove its files; a forked child only closes its copies. Safe without the lock.

        The owner file goes last: until then it keeps others from claiming the slot.
        """
        if os.getpid() == self._pid:
            self.set("claim", FREE)
            if self._files_are_current():
                write_point("unlink")
                self.folder.remove(self.index)
            fcntl.flock(self._owner_fd, fcntl.LOCK_UN)
        self.close()

    def close(self) -> None:
        """Close the descriptors, as death does."""
        for fd in (self._owner_fd, self.bell_fd):
            if fd >= 0:
                close_private(fd)
        self._owner_fd = self.bell_fd = -1
        self.engine_bell.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _free_slot(self, file: LedgerFile) -> int:
        for slot in file.slots:
            if file.get(slot, "claim") == FREE and not self.folder.alive(slot):
                return slot
        raise LedgerError(
            f"{self.folder.ledger}: all {file.header.slot_count} slots are taken by living engines"
        )

    def _make_files(self, slot: int) -> None:
        """Make the owner file, locked before it gets its name, and the doorbells of a slot."""
        fresh = self.folder.fresh(slot)
        write_point("owner.new")
        fresh.unlink(missing_ok=True)
        owner_fd = open_private(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, self.folder.file_mode)
        os.fchmod(owner_fd, self.folder.file_mode)
        fcntl.flock(owner_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_point("bells")
        make_bell(self.folder.worker_bell(slot), self.folder.file_mode)
        make_bell(self.folder.engine_bell(slot), self.folder.file_mode)
        write_point("owner")
        os.rename(fresh, self.folder.owner(slot))
        bell_fd = open_bell(self.folder.worker_bell(slot))
        if self.bell_fd >= 0:
            os.dup2(bell_fd, self.bell_fd, inheritable=False)  # pollers keep the number of the descriptor
            close_private(bell_fd)
        else:
            self.bell_fd = bell_fd
        if self._owner_fd >= 0:
            close_private(self._owner_fd)
        self._owner_fd = owner_fd
        self.engine_bell.close()
        self.engine_bell = Ringer(self.folder.engine_bell(slot))

    def _files_are_current(self) -> bool:
        pairs = (
            (self._owner_fd, self.folder.owner(self.index)),
            (self.bell_fd, self.folder.worker_bell(self.index)),
        )
        try:
            return all(
                os.path.samestat(os.fstat(fd), os.stat(path)) for fd, path in pairs
            ) and os.path.exists(self.folder.engine_bell(self.index))
        except OSError:
            return False
