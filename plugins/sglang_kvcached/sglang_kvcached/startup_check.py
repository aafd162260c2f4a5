"""Checks at the start that an engine really is elastic: in each scheduler, and in its parent."""

from __future__ import annotations

import os
from typing import Any

from kvcached_core.errors import InvariantError
from kvcached_core.ledger import Runtime, snapshot
from sglang_kvcached import process_state, support
from sglang_kvcached.process_state import RUN_VARIABLE


def why_not_elastic(scheduler: Any) -> str:
    """Say why this process's complete scheduler is not elastic, or return an empty text."""
    rank_memory = process_state.find_rank_memory()
    if rank_memory is None or not rank_memory.page_pools:
        return f"its KV pool is {type(scheduler.token_to_kv_pool_allocator.get_kvcache()).__name__}"
    if not all(page_pool.owner is not None for page_pool in rank_memory.page_pools):
        return f"its allocator is {type(scheduler.token_to_kv_pool_allocator).__name__}"
    if process_state.find_scheduler_memory() is None:
        return "no code sets its memory budget"
    return ""


def elastic_ranks() -> int:
    """Return how many ranks of this run have an elastic KV cache: live in the ledger, with a geometry."""
    run = os.environ.get(RUN_VARIABLE, "")
    devices = snapshot(Runtime.open(support.settings().runtime_dir or None))
    return sum(
        owner.live and owner.engine == "sglang" and owner.granule_count > 0
        and owner.instance.startswith(f"{run}-")
        for device in devices for owner in device.owners
    )  # fmt: skip


def require_elastic_ranks(schedulers: int) -> None:
    """Raise InvariantError, which stops the server, unless all `schedulers` are elastic."""
    found = elastic_ranks()
    if found < schedulers:
        raise InvariantError(
            f"an elastic KV cache was asked for, and {found} of {schedulers} schedulers have one: this "
            "server stops instead of serving without it. Is sglang-kvcached installed where the schedulers "
            "run, and does SGLANG_PLUGINS name it? Use --kv-cache-backend default to serve with SGLang's own "
            "KV cache"
        )
