"""The runtime directory: a folder of the user, with a folder for each device and its ledger's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvcached_core.errors import LedgerError
from kvcached_core.ledger.file.descriptors import close_private, open_private

VARIABLE = "KVCACHED_RUNTIME_DIR"
_CLOCK_TICK_NS = 100_000_000  # well above the 1 to 10 ms of a file system's clock
_SLOT_FILE = re.compile(r"slot-(\d+)\.(?:owner|worker|engine|new)")


class FolderState(NamedTuple):
    """A folder's state: it stays equal only while no name in the folder is made, renamed or removed."""

    device: int
    inode: int
    changed_ns: int


@dataclass(frozen=True)
class DeviceFolder:
    """The files of one device's ledger, and their mode."""

    path: Path
    file_mode: int

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def history(self) -> Path:
        """The file of the latest events, for tools."""
        return self.path / "history.jsonl"

    @property
    def old_history(self) -> Path:
        """The file of the events before those."""
        return self.path / "history.old.jsonl"

    def owner(self, slot: int) -> Path:
        """Return the file on which the owner of a slot holds a flock for as long as it lives."""
        return self.path / f"slot-{slot:02d}.owner"

    def fresh(self, slot: int) -> Path:
        """Return the name that an owner file has until it is locked."""
        return self.path / f"slot-{slot:02d}.new"

    def worker_bell(self, slot: int) -> Path:
        return self.path / f"slot-{slot:02d}.worker"

    def engine_bell(self, slot: int) -> Path:
        return self.path / f"slot-{slot:02d}.engine"

    def state(self) -> FolderState | None:
        """Return a state that changes with the names in the folder; None if the folder is missing.

        None also if it changed within the last clock tick of the file system: the next change might have the
        same time.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        if abs(time.time_ns() - status.st_mtime_ns) < _CLOCK_TICK_NS:
            return None
        return FolderState(status.st_dev, status.st_ino, status.st_mtime_ns)

    def make(self) -> None:
        """Create the folder if it is missing. Raises OSError."""
        mode = 0o2770 if self.file_mode == 0o660 else 0o700
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=mode)
            self.path.chmod(mode)  # mkdir applies the umask

    def slots_with_files(self) -> set[int]:
        """Return the slots that have any file, of living or dead owners."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in map(_SLOT_FILE.fullmatch, names) if match}

    def alive(self, slot: int) -> bool:
        """Return whether a living process owns the slot: it holds an exclusive lock on the owner file.

        The probe tries a shared lock, so two probes never take each other for an owner.
        """
        try:
            # Not a Path: making one takes longer than both system calls, and a lease probes all slots.
            fd = open_private(f"{self.path}/slot-{slot:02d}.owner", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            close_private(fd)
        return False

    def remove(self, slot: int) -> None:
        """Remove the files of a slot. The owner file goes last: until then it keeps others off the slot."""
        for path in (self.fresh(slot), self.worker_bell(slot), self.engine_bell(slot), self.owner(slot)):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Runtime:
    """A runtime directory that is safe to use; `shared` if it was opened to a group on purpose."""

    path: Path
    shared: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] = os.environ,
             create: bool = True) -> Runtime:  # fmt: skip
        """Return the directory `path`, else KVCACHED_RUNTIME_DIR, else the user's own under /dev/shm.

        With `create` it is created if it is missing. Raises LedgerError if it is not safe to use.
        """
        named = path or environ.get(VARIABLE)
        folder = Path(named) if named else default_path()
        try:
            if create and not folder.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat() if named else folder.lstat()
        except FileNotFoundError:
            return cls(folder)  # there is nothing to read yet
        except OSError as error:
            raise LedgerError(
                f"runtime directory {folder}: {error.strerror}; set {VARIABLE} to another"
            ) from error
        return cls(folder, _judge(folder, status, explicit=bool(named)))

    @property
    def file_mode(self) -> int:
        return 0o660 if self.shared else 0o600

    @property
    def lock(self) -> Path:
        """The lock that instances of all devices hold while they choose their names."""
        return self.path / "lock"

    def device(self, uuid: str) -> DeviceFolder:
        """Return the folder of a device, whether it exists or not."""
        name = re.sub(r"[^A-Za-z0-9_-]", "_", uuid)[:80] or "_"
        return DeviceFolder(self.path / name, self.file_mode)

    def devices(self) -> list[DeviceFolder]:
        """Return the folders of all devices that have a ledger, sorted by name."""
        try:
            found = sorted(
                entry.path for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False)
            )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(f"runtime directory {self.path}: {error.strerror}") from error
        return [DeviceFolder(Path(path), self.file_mode) for path in found]


def default_path() -> Path:
    """Return the user's own runtime directory."""
    return Path(f"/dev/shm/kvcached-{os.getuid()}")


def _judge(folder: Path, status: os.stat_result, explicit: bool) -> bool:
    """Return whether the directory is shared with a group; raises LedgerError if it is not safe to use."""
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        raise LedgerError(
            f"runtime directory {folder} is not a directory; remove it or set {VARIABLE} to another"
        )
    if explicit and mode == 0o2770:
        return True
    if status.st_uid != os.getuid():
        raise LedgerError(
            f"runtime directory {folder} belongs to user {status.st_uid}, not to {os.getuid()}: set "
            f"{VARIABLE} to a directory of your own, or to one of mode 2770, shared with a group on purpose"
        )
    if mode & 0o022:
        raise LedgerError(
            f"runtime directory {folder} has mode {mode:04o}, so other users can write into it: run "
            f"chmod 700 {folder}, or share it with one group on purpose: chmod 2770 and name it in {VARIABLE}"
        )
    return False
