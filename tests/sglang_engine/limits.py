"""A limit that changes every second."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvcached_core.ledger import Runtime, set_limit

_EVERY_SECONDS = 1.0


class Moves:
    """Counts the changes of a limit."""

    def __init__(self) -> None:
        self._made = 0
        self._failure: BaseException | None = None

    @property
    def made(self) -> int:
        """Return the count; raise the error that ended the changes, if any."""
        if self._failure is not None:
            raise self._failure
        return self._made

    def make(self, runtime: Path, name: str, limits_bytes: Sequence[int], stop: threading.Event) -> None:
        """Set the limits in turn, one a second, until told to stop."""
        try:
            opened = Runtime.open(runtime)
            for limit_bytes in itertools.cycle(limits_bytes):
                if stop.wait(_EVERY_SECONDS):
                    return
                set_limit(opened, name, limit_bytes)
                self._made += 1
        except BaseException as error:
            self._failure = error


@contextmanager
def moving_limit(runtime: Path, name: str, limits_bytes: Sequence[int], last_bytes: int) -> Iterator[Moves]:
    """Change the limit during the block; then set the last limit."""
    moves, stop = Moves(), threading.Event()
    thread = threading.Thread(target=moves.make, args=(runtime, name, limits_bytes, stop))
    thread.start()
    try:
        yield moves
    finally:
        stop.set()
        thread.join()
    set_limit(Runtime.open(runtime), name, last_bytes)
