"""Exit codes, and the error that ends a command with one of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum

INTERRUPTED = 130


class ExitCode(IntEnum):
    """The exit codes of commands."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_SUCH_ENGINE = 3
    TIMED_OUT = 4
    INTEGRITY = 5


class CommandError(Exception):
    """Ends a command with the exit code `code`. The text says what failed, why, and what to do next."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def no_such_engine(name: str, names: Iterable[str]) -> CommandError:
    """Return the error for a name that no engine has. The message suggests the most similar of `names`."""
    known = sorted(set(names))
    if not known:
        message = f"no engine is named {name!r}: no engine is running (see kvctl doctor)"
        return CommandError(ExitCode.NO_SUCH_ENGINE, message)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    message = f"no engine is named {name!r}: {hint}Known engines: {', '.join(known)}"
    return CommandError(ExitCode.NO_SUCH_ENGINE, message)
