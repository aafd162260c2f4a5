"""Whether the schedulers of an engine really are elastic, as the ledger shows it."""

from __future__ import annotations

import os

from kvcached_core.errors import InvariantError
from kvcached_core.ledger import Runtime, snapshot
from sglang_kvcached import RUN_VARIABLE, support


def elastic_ranks() -> int:
    """Return how many ranks of this run hold an elastic KV cache: attached, and with a geometry."""
    run = os.environ.get(RUN_VARIABLE, "")
    devices = snapshot(Runtime.open(support.settings().runtime_dir or None))
    return sum(
        owner.live and owner.engine == "sglang" and owner.granule_count > 0
        and owner.instance.startswith(f"{run}-")
        for device in devices for owner in device.owners
    )  # fmt: skip


def require_elastic(schedulers: int) -> None:
    """Raise InvariantError, which stops the server, unless as many ranks are elastic as are ready."""
    found = elastic_ranks()
    if found < schedulers:
        raise InvariantError(
            f"an elastic KV cache was asked for, and {found} of {schedulers} schedulers have one: stopped "
            "rather than served without. Is sglang-kvcached installed where the schedulers run, and does "
            "SGLANG_PLUGINS name it? Use --kv-cache-backend default to serve without"
        )
