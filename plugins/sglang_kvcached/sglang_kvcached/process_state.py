"""The elastic memory of this process: what the hooks in SGLang call."""

from __future__ import annotations

from typing import Any

from kvcached_core.errors import InvariantError
from sglang_kvcached.rank_memory import RankMemory
from sglang_kvcached.scheduler_memory import SchedulerMemory

_rank: RankMemory | None = None
_service: SchedulerMemory | None = None


def required() -> RankMemory:
    """Return this rank's memory, made from its start. Raises InvariantError where no start is under way."""
    global _rank
    if _rank is None:
        from sglang_kvcached import starting

        _rank = RankMemory(starting.current())
    return _rank


def use(rank: RankMemory | None, service: SchedulerMemory | None = None) -> None:
    """Make these the memory and the service of this process."""
    global _rank, _service
    _rank, _service = rank, service


def required_service() -> SchedulerMemory:
    """Return what settles the budget. Raises InvariantError before SGLang's scheduler is complete."""
    if _service is None:
        raise InvariantError("the scheduler is not complete: nobody settles its budget")
    return _service


def service() -> SchedulerMemory | None:
    """Return what settles the budget; None until SGLang's scheduler is complete."""
    return _service


def is_claimed() -> bool:
    """Say whether the slots of this process have an owner: pools made now are a draft model's."""
    return _rank is not None and _rank.is_claimed


def mapped_bytes() -> int:
    """Return what is mapped; from any thread, 0 before there is a pool."""
    return 0 if _rank is None else _rank.mapped_bytes()


def pool_class(kind: str) -> type | None:
    """Return the elastic class for a kind of pool, or None for one that stays SGLang's own."""
    from sglang_kvcached import pools

    return {"mha": pools.ElasticMHATokenToKVPool, "mla": pools.ElasticMLATokenToKVPool}.get(str(kind))


def paged_allocator_class() -> type:
    """Return the allocator for pages of more than one slot."""
    from sglang_kvcached import allocators

    return allocators.ElasticPagedAllocator


def rebind() -> None:
    """Put the elastic allocators where SGLang names its own without asking the platform."""
    from sglang_kvcached import allocators

    allocators.rebind()


def begin_service(scheduler: Any, start: Any) -> None:
    """SGLang's scheduler is complete: from now on memory comes and goes."""
    global _service
    if _rank is None or not _rank.is_claimed:
        return  # problem() says so
    _service = SchedulerMemory.begin(_rank, scheduler, start)


def problem(scheduler: Any) -> str:
    """Say in what way a complete scheduler is not elastic, or return an empty text."""
    if _rank is None or not _rank.sheets:
        return f"its KV pool is {type(scheduler.token_to_kv_pool_allocator.get_kvcache()).__name__}"
    if not all(sheet.owner is not None for sheet in _rank.sheets):
        return f"its allocator is {type(scheduler.token_to_kv_pool_allocator).__name__}"
    if _service is None:
        return "nobody settles its budget"
    return ""


def close() -> None:
    """Give all memory back; may be repeated."""
    global _rank, _service
    settled, _service = _service, None
    rank, _rank = _rank, None
    try:
        if settled is not None:
            settled.close()
    finally:
        if rank is not None:
            rank.close()


def current() -> RankMemory:
    """Return this rank's memory. Raises InvariantError if there is none."""
    if _rank is None:
        raise InvariantError("this process has no elastic memory")
    return _rank
