"""The globals of one SGLang process: this rank's memory and its scheduler's view of it.

SGLang creates pools and allocators itself, so they find the memory here and not in an argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcached_core.errors import InvariantError

if TYPE_CHECKING:
    from sglang_kvcached.rank_memory import RankMemory
    from sglang_kvcached.scheduler_memory import SchedulerMemory

# Set in the first process of an engine, inherited by its other processes: a part of the instance name.
RUN_VARIABLE = "_KVCACHED_RUN"

_rank_memory: RankMemory | None = None
_scheduler_memory: SchedulerMemory | None = None


def use(rank_memory: RankMemory | None, scheduler_memory: SchedulerMemory | None = None) -> None:
    """Set both globals; the scheduler's is None until SGLang's scheduler is complete."""
    global _rank_memory, _scheduler_memory
    _rank_memory, _scheduler_memory = rank_memory, scheduler_memory


def rank_memory() -> RankMemory:
    """Return this rank's memory. Raises InvariantError outside an elastic scheduler process."""
    if _rank_memory is None:
        raise InvariantError("only a scheduler process that started with kvcached has elastic memory")
    return _rank_memory


def find_rank_memory() -> RankMemory | None:
    """Return this rank's memory, or None outside an elastic scheduler process."""
    return _rank_memory


def scheduler_memory() -> SchedulerMemory:
    """Return the scheduler's memory. Raises InvariantError before SGLang's scheduler is complete."""
    if _scheduler_memory is None:
        raise InvariantError("the memory budget was asked for before SGLang's scheduler was complete")
    return _scheduler_memory


def find_scheduler_memory() -> SchedulerMemory | None:
    """Return the scheduler's memory, or None until SGLang's scheduler is complete."""
    return _scheduler_memory


def slots_are_owned() -> bool:
    """Say whether allocators own this process's slots: a pool made now belongs to a draft model."""
    return _rank_memory is not None and _rank_memory.has_owner


def mapped_bytes() -> int:
    """Return the mapped bytes, 0 before a pool exists. May be called from any thread."""
    return 0 if _rank_memory is None else _rank_memory.mapped_bytes()


def close() -> None:
    """Give all memory back. A second call does nothing."""
    global _rank_memory, _scheduler_memory
    scheduler_memory, _scheduler_memory = _scheduler_memory, None
    rank_memory, _rank_memory = _rank_memory, None
    try:
        if scheduler_memory is not None:
            scheduler_memory.close()
    finally:
        if rank_memory is not None:
            rank_memory.close()
