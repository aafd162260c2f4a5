"""Watch a ledger from outside: sample each engine's bytes, or read single ledger words every 0.2 ms."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger import DeviceSnapshot, OwnerSnapshot, Runtime, snapshot
from kvcached_core.ledger.file.storage import LedgerFile

LOOK_SECONDS = 0.02
WORD_SECONDS = 0.0002


class Seen(NamedTuple):
    """One engine at one moment, in bytes."""

    held: int
    used: int
    cached: int
    starting: int  # claimed by an engine whose start waits for memory


NOTHING = Seen(0, 0, 0, 0)


class Moment(NamedTuple):
    """All engines at one moment, by name; `at` is in seconds of the monotonic clock."""

    at: float
    seen: dict[str, Seen]
    free: int = 0  # bytes; 0 without a `look`

    def of(self, name: str) -> Seen:
        return self.seen.get(name, NOTHING)


def owner_named(runtime: Runtime, name: str) -> OwnerSnapshot:
    """Return the owner of this name as the ledger shows it now. Raises LookupError if there is none."""
    for device in snapshot(runtime):
        for owner in device.owners:
            if owner.name == name:
                return owner
    raise LookupError(f"the ledger has no engine named {name}")


class Watch:
    """A thread that samples the ledger, and a list of events."""

    def __init__(self, runtime: Runtime, look: Callable[[list[DeviceSnapshot]], int] | None = None) -> None:
        """`look` is called for every sample and returns the free bytes."""
        self._look = look or (lambda devices: 0)
        self.started = time.monotonic()
        self.moments: list[Moment] = []
        self.events: list[tuple[float, str]] = []
        self._runtime = runtime
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def note(self, text: str) -> None:
        """Record an event, and print it."""
        self.events.append((time.monotonic() - self.started, text))
        print(f"{self.events[-1][0]:7.1f} s  {text}", flush=True)

    def owner(self, name: str) -> OwnerSnapshot:
        """Return an engine as the ledger shows it now. Raises LookupError."""
        return owner_named(self._runtime, name)

    def between(self, begin: float, end: float | None = None) -> list[Moment]:
        """Return the moments from `begin` to `end` (None: now), in seconds of the monotonic clock."""
        return [one for one in self.moments if begin <= one.at and (end is None or one.at <= end)]

    def starting_seconds(self, name: str) -> float:
        """Return how long an engine's start has waited for memory."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return sum(after.at - before.at for before, after in pairs if before.of(name).starting)

    def series(self, names: Iterable[str], step_seconds: float) -> dict[str, list[float]]:
        """Return samples for a result, at least `step_seconds` apart; times count from the watch's start."""
        kept: list[Moment] = []
        for moment in self.moments:
            if not kept or moment.at - kept[-1].at >= step_seconds:
                kept.append(moment)
        samples = {"time_seconds": [round(moment.at - self.started, 3) for moment in kept]}
        for name in names:
            samples[f"{name}_held_bytes"] = [moment.of(name).held for moment in kept]
            samples[f"{name}_used_bytes"] = [moment.of(name).used for moment in kept]
            samples[f"{name}_cached_bytes"] = [moment.of(name).cached for moment in kept]
        if any(moment.free for moment in kept):
            samples["free_bytes"] = [moment.free for moment in kept]
        return samples

    def stop(self) -> None:
        """Stop sampling."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with contextlib.suppress(KVCachedError):  # a ledger file may be incomplete while it is made
                devices = snapshot(self._runtime)
                owners = [owner for device in devices for owner in device.owners if owner.live]
                seen = {
                    owner.name: Seen(
                        owner.ready_bytes, owner.used_bytes, owner.cached_bytes, owner.starting_bytes
                    )
                    for owner in owners
                }
                self.moments.append(Moment(time.monotonic(), seen, self._look(devices)))


class Word(NamedTuple):
    """One 64-bit field of a slot in the ledger."""

    slot: int
    name: str


class Traced(NamedTuple):
    """The readings: one for each change, as (seconds of the monotonic clock, value of each word)."""

    rows: list[tuple[float, list[int]]]
    widest_gap_seconds: float  # between two readings


class Trace:
    """A process that reads words of a ledger continuously, while another process is measured."""

    def __init__(self, file: LedgerFile, words: Sequence[Word]) -> None:
        """Start the process; it reads between begin() and end()."""
        places = [str(file.at(word.slot, word.name)) for word in words]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.lib.ledger_watch", str(file.path), *places],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def begin(self) -> None:
        """Return once the process reads."""
        self._say()
        self._hear()

    def end(self) -> Traced:
        """Stop reading; return the readings."""
        self._say()
        rows, gap = json.loads(self._hear())
        return Traced([(at, values) for at, values in rows], gap)

    def close(self) -> None:
        """End the process; may be called again."""
        self._process.kill()
        self._process.wait()

    def _say(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that reads words ended with status {self._process.wait()}")
        return line


def read_words(words: Sequence[int], at: Sequence[int], is_over: Callable[[float], bool]) -> Traced:
    """Read the words at the indices `at` until `is_over` returns True; it waits the seconds it is given."""
    rows: list[tuple[float, list[int]]] = []
    before, read_at, gap = [-1], time.monotonic(), 0.0
    while True:
        now = time.monotonic()
        values = [words[index] for index in at]
        if values != before:
            rows.append((now, values))
            before = values
        gap, read_at = max(gap, now - read_at), now
        if is_over(WORD_SECONDS):
            return Traced(rows, gap)


def main() -> None:
    """Run as the process of a Trace: one line of input begins, the next ends and is answered in JSON."""
    words, at = LedgerFile(Path(sys.argv[1])).words, [int(place) for place in sys.argv[2:]]

    while os.read(0, 1):
        is_told = False

        def is_over(seconds: float) -> bool:
            nonlocal is_told
            if not is_told:
                print("reading", flush=True)
                is_told = True
            return bool(select.select([0], [], [], seconds)[0])

        traced = read_words(words, at, is_over)
        if os.read(0, 1):
            print(json.dumps(traced), flush=True)


if __name__ == "__main__":
    main()
