"""A third process that takes memory of one device: outside the ledger on a GPU, inside it on the host.

A host driver does not see the pages of other processes, so on the host the third process must be in the
ledger for its memory to be counted.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

from benchmarks.lib.taker import Taker
from kvcached_core.driver.registry import open_driver
from kvcached_core.ledger import OwnerSnapshot, Runtime
from kvcached_core.units import MIB

TAKE_SECONDS, LEAVE_SECONDS = 60.0, 30.0
TOOK = "took"
PAGE_BYTES = 2 * MIB


class Third(Protocol):
    """A process that takes memory and later gives it back."""

    def take(self, size_bytes: int) -> None:
        """Take `size_bytes`, and return once it holds them. Raises TimeoutError, RuntimeError."""

    def leave(self) -> None:
        """Give all memory back and end; may be called again."""


class Outsider:
    """A process that takes memory outside the ledger."""

    def __init__(self, driver: str, environ: Mapping[str, str]) -> None:
        """`environ` is added to this process's environment and selects the device."""
        self._driver, self._environ = driver, {**os.environ, **environ}
        self._process: subprocess.Popen[str] | None = None

    def take(self, size_bytes: int) -> None:
        """See Third."""
        command = [sys.executable, "-m", "benchmarks.sharing.third_process", "--driver", self._driver]
        command += ["--bytes", str(size_bytes)]
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environ
        )
        assert process.stdout is not None
        has_said = bool(select.select([process.stdout], [], [], TAKE_SECONDS)[0])
        if has_said and process.stdout.readline().strip() == TOOK:
            return
        self.leave()
        if not has_said:
            raise TimeoutError(f"the third process has not taken {size_bytes} bytes in {TAKE_SECONDS:.0f} s")
        raise RuntimeError(f"the third process took nothing and ended with status {process.returncode}")

    def leave(self) -> None:
        """See Third."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            process.communicate(timeout=LEAVE_SECONDS)
        finally:
            process.kill()
            process.wait()


class Insider:
    """An owner in the ledger of host memory; it lives in this process."""

    def __init__(self, runtime: Runtime, capacity_bytes: int, headroom_bytes: int,
                 like: Callable[[], OwnerSnapshot]) -> None:  # fmt: skip
        """`like` returns the owner whose page size the new owner uses."""
        self._runtime, self._capacity, self._headroom, self._like = (
            runtime, capacity_bytes, headroom_bytes, like,
        )  # fmt: skip
        self._taker: Taker | None = None

    def take(self, size_bytes: int) -> None:
        """See Third."""
        like, driver = self._like(), open_driver("host", 0, self._capacity)
        granules = size_bytes // like.page_bytes - 1  # a Taker holds one more granule than it is asked for
        self._taker = Taker(
            self._runtime, driver, self._headroom, like.page_bytes, like.blocks_per_granule, granules
        )
        self._taker.wish()
        self._taker.wait_for_all(TAKE_SECONDS)

    def leave(self) -> None:
        """See Third."""
        if self._taker is not None:
            taker, self._taker = self._taker, None
            taker.give_back(LEAVE_SECONDS)
            taker.close()


def main() -> None:
    """Take memory, print a line, and hold the memory until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", required=True)
    parser.add_argument("--bytes", type=int, required=True)
    options = parser.parse_args()
    driver = open_driver(options.driver, 0, 0)
    if (free_bytes := driver.memory().free_bytes) < options.bytes:
        parser.exit(1, f"{options.bytes} bytes were to be taken, {free_bytes} bytes are free\n")
    pages = [driver.create(PAGE_BYTES) for _ in range(options.bytes // PAGE_BYTES)]
    print(TOOK, flush=True)
    sys.stdin.read()
    for handle in pages:
        driver.release(handle)
    driver.close()


if __name__ == "__main__":
    main()
