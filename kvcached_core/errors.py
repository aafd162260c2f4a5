"""The errors of this project, one class for each reaction that a caller can have."""

from __future__ import annotations


class KVCachedError(Exception):
    """Base of all errors that this project raises on purpose."""


class CapacityError(KVCachedError):
    """There is no room now; the caller may evict, wait or ask for less."""


class DriverError(KVCachedError):
    """A call into the driver failed, and not for lack of room.

    Attributes: `call`, the name of the driver's function; `status`, the driver's own code.
    """

    def __init__(self, call: str, status: int, message: str) -> None:
        super().__init__(f"{call} failed with status {status}: {message}")
        self.call = call
        self.status = status


class UnsupportedError(KVCachedError):
    """An engine, device or combination of options is not supported; the text says what to do instead."""


class ConfigError(KVCachedError):
    """An option or variable has an illegal value; the text names it and the legal values."""


class LedgerError(KVCachedError):
    """The ledger cannot be used: it is damaged, of another version, full, or owned by another user."""


class BusyError(LedgerError):
    """The ledger's lock was not free in time; nothing was changed, so the caller may try again."""


class InvariantError(KVCachedError):
    """An invariant of docs/design.md does not hold: a bug in this project."""
