"""A ledger opened by a tool: mapped, with its lock held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvcached_core.ledger.file.lock import LedgerLock
from kvcached_core.ledger.file.runtime import DeviceFolder
from kvcached_core.ledger.file.storage import LedgerFile


@contextlib.contextmanager
def locked(folder: DeviceFolder) -> Iterator[LedgerFile | None]:
    """Hold the lock of a device with its ledger mapped; yields None if it has none.

    Raises BusyError, LedgerError.
    """
    if not folder.ledger.exists():
        yield None
        return
    with (
        LedgerLock(folder.lock, folder.file_mode).held(),
        contextlib.closing(LedgerFile(folder.ledger)) as file,
    ):
        yield file
