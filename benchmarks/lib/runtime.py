"""A runtime directory, and so ledgers, for one benchmark alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from kvcached_core.ledger import Runtime


@contextlib.contextmanager
def own_runtime() -> Iterator[Runtime]:
    """Give this process and its children an empty runtime directory, removed at the end."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvcached-bench-") as folder:
        os.environ["KVCACHED_RUNTIME_DIR"] = folder
        yield Runtime.open(folder)
