"""The runtime directory: one folder per user, and in it one per device with its ledger's files."""

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
_CLOCK_TICK_NS = 100_000_000  # of file systems: 1 to 10 ms
_SLOT_FILE = re.compile(r"slot-(\d+)\.(?:owner|worker|engine|new)")


class FolderState(NamedTuple):
    """A folder at a moment: it is the same again only if no name in it was made, renamed or removed."""

    device: int
    inode: int
    changed_ns: int


@dataclass(frozen=True)
class DeviceFolder:
    """The files of one device's ledger; `file_mode` is theirs."""

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
        """The latest events, for tools."""
        return self.path / "history.jsonl"

    @property
    def old_history(self) -> Path:
        """Those before."""
        return self.path / "history.old.jsonl"

    def owner(self, slot: int) -> Path:
        """Return the file that the owner of a slot holds a flock on for as long as it lives."""
        return self.path / f"slot-{slot:02d}.owner"

    def fresh(self, slot: int) -> Path:
        """Return the name an owner file has until it is locked."""
        return self.path / f"slot-{slot:02d}.new"

    def worker_bell(self, slot: int) -> Path:
        return self.path / f"slot-{slot:02d}.worker"

    def engine_bell(self, slot: int) -> Path:
        return self.path / f"slot-{slot:02d}.engine"

    def state(self) -> FolderState | None:
        """Return what tells whether names in it change; None if it is missing or changed just now, when the
        file system's clock might not tell the next change from that one."""
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
            self.path.chmod(mode)  # whatever the umask was

    def slots_with_files(self) -> set[int]:
        """Return the slots that have any file, dead or alive."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in map(_SLOT_FILE.fullmatch, names) if match}

    def alive(self, slot: int) -> bool:
        """Say whether a living process owns the slot: it holds its file exclusively.

        The probe asks for a shared lock, so that two probes never take each other for an owner.
        """
        try:
            # A name, not a Path: that costs more than both system calls, and a lease looks at all slots.
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
        """Remove the files of a slot, its owner file last: until then it keeps others off the slot."""
        for path in (self.fresh(slot), self.worker_bell(slot), self.engine_bell(slot), self.owner(slot)):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Runtime:
    """A runtime directory that was found safe to use; `shared` if a group was given it on purpose."""

    path: Path
    shared: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] = os.environ,
             create: bool = True) -> Runtime:  # fmt: skip
        """Return the directory named by `path`, by KVCACHED_RUNTIME_DIR, or the user's own under /dev/shm.

        It is created if it is missing and `create` says so. Raises LedgerError if it is not safe to use.
        """
        named = path or environ.get(VARIABLE)
        folder = Path(named) if named else default_path()
        try:
            if create and not folder.exists():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat() if named else folder.lstat()
        except FileNotFoundError:
            return cls(folder)  # nothing there yet, and nothing to be read
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
        """The lock under which instances choose their names, over all devices."""
        return self.path / "lock"

    def device(self, uuid: str) -> DeviceFolder:
        """Return the folder of a device, there or not."""
        name = re.sub(r"[^A-Za-z0-9_-]", "_", uuid)[:80] or "_"
        return DeviceFolder(self.path / name, self.file_mode)

    def devices(self) -> list[DeviceFolder]:
        """Return the folders of all devices that have one, sorted by name."""
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
    """Return whether the directory is shared by a group; raises LedgerError if it cannot be trusted."""
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        raise LedgerError(
            f"runtime directory {folder} is no directory; remove it or set {VARIABLE} to another"
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
            f"runtime directory {folder} has mode {mode:04o}, so that others can write it: run "
            f"chmod 700 {folder}, or share it with one group on purpose: chmod 2770 and name it in {VARIABLE}"
        )
    return False
