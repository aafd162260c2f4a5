"""Exit codes, and the one way a command fails."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class Code(IntEnum):
    """What a command's exit code means."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_SUCH_ENGINE = 3
    TIMED_OUT = 4
    INTEGRITY = 5


class Failure(Exception):
    """Ends a command: `code` is its exit code, the text what went wrong, why and what to do next."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def no_such_engine(name: str, names: Iterable[str]) -> Failure:
    """Return the failure for a name that no living engine has, with the nearest one there is."""
    known = sorted(set(names))
    if not known:
        return Failure(
            Code.NO_SUCH_ENGINE, f"no engine is named {name!r}: none is running (see kvctl doctor)"
        )
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return Failure(Code.NO_SUCH_ENGINE, f"no engine is named {name!r}: {hint}There are: {', '.join(known)}")
