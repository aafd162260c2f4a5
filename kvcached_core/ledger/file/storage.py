"""A ledger file, mapped: aligned 8-byte loads and stores; tests see every write at one place.

The file keeps the length that its header states. It is replaced by renaming, never cut. If its user cuts it
while it is mapped, the kernel ends processes that read it, so its length is checked each time the lock is
taken, before any word is read.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import os
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import InvariantError, LedgerError, UnsupportedError
from kvcached_core.ledger.file import layout
from kvcached_core.ledger.file.layout import HEADER_AT, SLOT_AT, TEXT_BYTES, TIMES, WORD

WriteHook = Callable[[str], None]
Row = Mapping[str, int]  # a slot's fields by name, except texts and histograms

_NAMES = tuple(name for name in SLOT_AT if name not in TEXT_BYTES and name not in TIMES)
_pick = operator.itemgetter(*(SLOT_AT[name] for name in _NAMES))
_write_hook: WriteHook | None = None
# os.lseek() releases the GIL, and a thread beside an engine's loop then waits to get it back.
_lseek = ctypes.PyDLL(None).lseek
_lseek.argtypes, _lseek.restype = [ctypes.c_int, ctypes.c_int64, ctypes.c_int], ctypes.c_int64


def set_write_hook(hook: WriteHook | None) -> None:
    """Call `hook` with a name before every change of a ledger or its files; for tests that kill there."""
    global _write_hook
    _write_hook = hook


def write_point(name: str) -> None:
    """Call the hook of the tests: a change follows."""
    if _write_hook is not None:
        _write_hook(name)


class OtherVersionError(LedgerError):
    """The ledger has another major version."""


class Header(NamedTuple):
    """The header of a ledger; its fields are those of the layout."""

    minor: int
    header_bytes: int
    slot_bytes: int
    slot_count: int
    capacity_bytes: int
    headroom_bytes: int
    generation: int

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + self.slot_bytes * self.slot_count


def parse_header(data: bytes, file_bytes: int) -> Header:
    """Read a header and check it against the length of its file.

    Raises LedgerError if the file is damaged, OtherVersionError if it is of another major version.
    """
    if len(data) < layout.HEADER_WORDS * WORD:
        raise LedgerError(f"the ledger is damaged: {file_bytes} bytes are too few for its header")
    words = struct.unpack_from(f"<{layout.HEADER_WORDS}Q", data)
    if words[HEADER_AT["magic"]] != layout.MAGIC:
        raise LedgerError("the ledger is damaged: it does not begin with KVLEDGER")
    if words[HEADER_AT["major"]] != layout.MAJOR:
        raise OtherVersionError(
            f"the ledger has layout {words[HEADER_AT['major']]}, this version {layout.MAJOR}"
        )
    header = Header(*(words[HEADER_AT[name]] for name in Header._fields))
    sizes_fit = (
        header.header_bytes % WORD == 0 and layout.HEADER_WORDS * WORD <= header.header_bytes <= 1 << 16
        and header.slot_bytes % WORD == 0 and layout.SLOT_WORDS * WORD <= header.slot_bytes <= 1 << 16
        and 1 <= header.slot_count <= 1024
    )  # fmt: skip
    if not sizes_fit or header.file_bytes > file_bytes:
        raise LedgerError(f"the ledger is damaged: its sizes do not fit its {file_bytes} bytes")
    if not _are_possible(header.capacity_bytes, header.headroom_bytes):
        raise LedgerError("the ledger is damaged: its capacity or headroom is impossible")
    return header


def _are_possible(capacity_bytes: int, headroom_bytes: int) -> bool:
    return 0 <= headroom_bytes <= capacity_bytes < layout.WORD_LIMIT


class LedgerFile:
    """One ledger file, mapped."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raises FileNotFoundError, LedgerError if it is damaged or of another version."""
        if sys.byteorder != "little":
            raise UnsupportedError("the ledger needs a little-endian machine")
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(self._fd)
            self.header = parse_header(os.pread(self._fd, layout.HEADER_BYTES, 0), status.st_size)
            self._map = mmap.mmap(self._fd, self.header.file_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self.path = path
        self._mapped_bytes = self.header.file_bytes
        self._inode = (status.st_dev, status.st_ino)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")

    def close(self) -> None:
        """Unmap the file; using it afterwards raises ValueError. May be repeated."""
        if self._fd < 0:
            return
        self.words.release()
        self._bytes.release()
        self._map.close()
        os.close(self._fd)
        self._fd = -1

    def is_current(self) -> bool:
        """Return whether the path still names this file, and the file is intact."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode and self.is_intact()

    def is_whole(self) -> bool:
        """Return whether the mapped file, even if it has no name, is still as long as its mapping."""
        return int(_lseek(self._fd, 0, os.SEEK_END)) >= self._mapped_bytes  # a third of the cost of fstat

    def is_intact(self) -> bool:
        """Return whether the mapped file, even if it has no name, is whole and its header is valid."""
        words = self.words
        return (
            self.is_whole()
            and words[HEADER_AT["magic"]] == layout.MAGIC and words[HEADER_AT["major"]] == layout.MAJOR
        )  # fmt: skip

    @property
    def uuid(self) -> str:
        """The UUID of the device, as its driver names it."""
        start = HEADER_AT["uuid"] * WORD
        return layout.decode_text(bytes(self._bytes[start : start + TEXT_BYTES["uuid"]]))

    @property
    def slots(self) -> range:
        return range(self.header.slot_count)

    def at(self, slot: int, name: str) -> int:
        """Return the index of a slot's field in `words`."""
        return (self.header.header_bytes + slot * self.header.slot_bytes) // WORD + SLOT_AT[name]

    def claims(self) -> list[int]:
        """Return the claim of every slot."""
        step = self.header.slot_bytes // WORD
        return self.words[self.at(0, "claim") : self.header.file_bytes // WORD : step].tolist()

    def rows(self) -> dict[int, Row]:
        """Return the fields of all claimed slots, by slot.

        Copying a slot as a whole takes a tenth of the time of reading its words one by one.
        """
        step = self.header.slot_bytes // WORD
        rows: dict[int, Row] = {}
        for slot, claim in enumerate(self.claims()):
            if claim != layout.FREE:
                at = self.at(slot, "claim")
                rows[slot] = dict(zip(_NAMES, _pick(self.words[at : at + step].tolist()), strict=True))
        return rows

    def get(self, slot: int, name: str) -> int:
        return self.words[self.at(slot, name)]

    def set(self, slot: int, name: str, value: int) -> None:
        write_point(name)
        self.words[self.at(slot, name)] = value

    def set_header(self, name: str, value: int) -> None:
        write_point(name)
        self.words[HEADER_AT[name]] = value

    def show_memory(self, memory: MemoryInfo) -> None:
        """Write the free and total memory that the driver reports, for tools."""
        self.set_header("free_bytes", memory.free_bytes)
        self.set_header("total_bytes", memory.total_bytes)

    def get_text(self, slot: int, name: str) -> str:
        start = self.at(slot, name) * WORD
        return layout.decode_text(bytes(self._bytes[start : start + TEXT_BYTES[name]]))

    def set_text(self, slot: int, name: str, text: str) -> None:
        """Write a text, in several stores: only before the slot's claim is written."""
        start = self.at(slot, name)
        for i, (word,) in enumerate(struct.iter_unpack("<Q", layout.encode_text(text, TEXT_BYTES[name]))):
            write_point(name)
            self.words[start + i] = word


def fresh_path(path: Path) -> Path:
    """Return the name that a new ledger has until it is complete."""
    return path.with_suffix(".new")


def make_ledger(path: Path, mode: int, uuid: str, capacity_bytes: int, headroom_bytes: int,
                unwritten: set[int]) -> None:  # fmt: skip
    """Write a new ledger in place of any old one; the lock is held.

    The slots in `unwritten` belong to living owners that have yet to write them. Raises LedgerError if the
    file system has no room, InvariantError for sizes that no reader would accept.
    """
    if not _are_possible(capacity_bytes, headroom_bytes):
        raise InvariantError(f"no ledger of {capacity_bytes} bytes with a headroom of {headroom_bytes}")
    size_bytes = layout.HEADER_BYTES + layout.SLOT_BYTES * layout.SLOT_COUNT
    values = {
        "magic": layout.MAGIC, "major": layout.MAJOR, "minor": layout.MINOR,
        "header_bytes": layout.HEADER_BYTES, "slot_bytes": layout.SLOT_BYTES, "slot_count": layout.SLOT_COUNT,
        "capacity_bytes": capacity_bytes, "headroom_bytes": headroom_bytes,
        "generation": int.from_bytes(os.urandom(7), "little"),
    }  # fmt: skip
    data = bytearray(size_bytes)
    for name, value in values.items():
        struct.pack_into("<Q", data, HEADER_AT[name] * WORD, value)
    struct.pack_into("64s", data, HEADER_AT["uuid"] * WORD, layout.encode_text(uuid, 64))
    for slot in unwritten & set(range(layout.SLOT_COUNT)):
        struct.pack_into("<Q", data, layout.HEADER_BYTES + slot * layout.SLOT_BYTES, layout.UNWRITTEN)
    fresh = fresh_path(path)
    write_point("ledger.new")
    try:
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            os.fchmod(fd, mode)
            os.posix_fallocate(fd, 0, size_bytes)  # a write into a hole could kill the writer
            os.pwrite(fd, data, 0)
        finally:
            os.close(fd)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise LedgerError(f"cannot make {path}: {error.strerror}") from error
    write_point("ledger")
    os.rename(fresh, path)
