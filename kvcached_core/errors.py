"""What can go wrong, by what the caller may do about it."""

from __future__ import annotations


class KVCachedError(Exception):
    """Base of everything this project raises on purpose."""


class CapacityError(KVCachedError):
    """No room right now; the caller may evict, wait or ask for less."""


class DriverError(KVCachedError):
    """A call into the driver failed for another reason than lack of room.

    Attributes: `call`, the driver's name of the function; `status`, the driver's own code.
    """

    def __init__(self, call: str, status: int, message: str) -> None:
        super().__init__(f"{call} failed with status {status}: {message}")
        self.call = call
        self.status = status


class UnsupportedError(KVCachedError):
    """This engine, device or combination of options is refused; the text says what to do instead."""


class ConfigError(KVCachedError):
    """An option or variable has a value that is not legal; the text names it and what is legal."""


class LedgerError(KVCachedError):
    """The shared ledger cannot be used: damaged, of another version, full, or not ours to write."""


class BusyError(LedgerError):
    """The ledger's lock was not to be had within its bound; nothing was changed, try again."""


class InvariantError(KVCachedError):
    """A bug in this project: an invariant of docs/design.md does not hold."""
