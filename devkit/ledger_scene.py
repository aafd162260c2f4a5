"""Made-up ledgers of a busy machine, always with the same numbers. No memory is allocated."""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Account, Runtime
from kvcached_core.ledger.file.layout import WORD_LIMIT
from kvcached_core.ledger.file.storage import LedgerFile
from kvcached_core.units import GIB, MIB
from kvctl.kvtop.sampling import Sampler

GRANULE = 16 * MIB
NOON = time.mktime((2026, 1, 2, 12, 0, 0, 0, 0, -1))
GPUS = ("GPU-5d1a9c3e", "GPU-8f27b640")


class Part(NamedTuple):
    """One rank. Sizes are in granules; `words` holds further ledger fields by name."""

    name: str
    model: str
    gpu: int
    used: int
    cached: int
    spare: int
    limit: int = 5120
    floor: int = 64
    words: dict[str, int] = {}  # noqa: RUF012  a NamedTuple's default


CAST = (
    Part("llama-70b", "meta-llama/Llama-3.1-70B", 0, 1400, 520, 48, 2560, 320, {"busy": 1}),
    Part("llama-70b", "meta-llama/Llama-3.1-70B", 1, 1400, 520, 48, 2560, 320, {"busy": 1}),
    Part("qwen3-8b", "Qwen/Qwen3-8B", 0, 310, 200, 16, 1280, 64, {"busy": 1, "demand_bytes": 3 * GIB}),
    Part("mistral-7b", "mistralai/Mistral-7B-v0.3", 0, 4, 400, 0, 5120, 64, {
        "idle_since_ms": 1, "target_bytes": 2 * GIB, "asked_until_ms": WORD_LIMIT - 1}),
    Part("gemma-2b", "google/gemma-2-2b", 1, 220, 30, 8, 200, 64, {"busy": 1}),
)  # fmt: skip


def play(runtime: Runtime, cast: tuple[Part, ...] = CAST) -> list[Account]:
    """Attach the ranks of `cast` to ledgers, and write the fields that their engines would write."""
    accounts = []
    for part in cast:
        rank = sum(before.name == part.name for before in cast[: cast.index(part)])
        account = Account.attach(
            runtime, DeviceIdentity(GPUS[part.gpu], "H100"), 80 * GIB, 256 * MIB, instance=part.name,
            rank=rank, name=part.name, engine="vllm 0.32.0", model=part.model, limit_bytes=80 * GIB,
            floor_bytes=part.floor * GRANULE,
        )  # fmt: skip
        account.describe(
            page_bytes=GRANULE, granule_bytes=GRANULE, granule_count=5120, blocks_per_granule=8,
            block_count=8 * 5120, stride_bytes=2 * MIB,
        )  # fmt: skip
        held = (part.used + part.cached + part.spare) * GRANULE
        account.publish(0, 6 * GIB)
        assert account.lease(held, MemoryInfo(72 * GIB, 80 * GIB)) == held
        account.created(held // GRANULE)
        accounts.append(account)
        put(runtime, part.gpu, account.slot, used_bytes=part.used * GRANULE,
            cached_bytes=part.cached * GRANULE, limit_wanted=part.limit * GRANULE, **part.words)  # fmt: skip
    for gpu in {part.gpu for part in cast}:
        known = sum((p.used + p.cached + p.spare) * GRANULE + 6 * GIB for p in cast if p.gpu == gpu)
        with contextlib.closing(LedgerFile(runtime.device(GPUS[gpu]).ledger)) as file:
            file.set_header("free_bytes", max(0, 80 * GIB - known - GIB))
            file.set_header("outside_bytes", GIB)
    return accounts


def put(runtime: Runtime, gpu: int, slot: int, **words: int) -> None:
    """Write ledger fields of one slot."""
    with contextlib.closing(LedgerFile(runtime.device(GPUS[gpu]).ledger)) as file:
        for name, value in words.items():
            file.set(slot, name, value)


def sampler(runtime: Runtime, **more: Any) -> Sampler:
    """Return a sampler whose clock always shows noon."""
    return Sampler(runtime, wall=lambda: NOON, **more)


def crowd(count: int) -> tuple[Part, ...]:
    """Return `count` small engines on the first GPU."""
    return tuple(Part(f"engine-{n:02d}", "tiny/model", 0, 10 + n, 20, 4, 400, 2) for n in range(count))
