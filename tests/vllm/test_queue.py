"""The elastic free queue in vLLM's block pool, compared with a stock pool."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from devkit.report import record
from kvcached_core.errors import InvariantError
from tests.vllm.pools import (
    SIZE,
    cache,
    content,
    elastic_pool,
    granules_of,
    hits,
    removed,
    settle,
    stock_pool,
)

CONTENTS = 40  # different blocks: more than a pool holds


class TwinMachine(RuleBasedStateMachine):
    """Runs the same requests on a stock pool and on a fully mapped elastic pool of the same capacity."""

    steps = 0
    hits = 0

    @initialize(granules=st.integers(2, 9))
    def start(self, granules: int) -> None:
        self.pools = (stock_pool(granules * SIZE), elastic_pool(granules))
        granules_of(self.pools[1]).stale_turns = float("inf")  # evict block by block, as stock does
        self.requests: list[tuple[list[Any], list[Any]]] = []

    def _same(self, results: list[Any]) -> Any:
        assert results[0] == results[1]
        return results[0]

    def _take(self, pool: Any, contents: list[int], fresh: int) -> list[Any] | None:
        """Admit a request as the scheduler does. Cached blocks without users take room like new blocks."""
        found = hits(pool, contents)
        idle = sum(block.ref_cnt == 0 for block in found)
        new = len(contents) - len(found) + fresh
        if idle + new > pool.get_num_free_blocks():
            return None
        pool.touch(found)
        blocks = pool.get_new_blocks(new)
        cache(pool, blocks[: len(contents) - len(found)], contents[len(found) :])
        return [*found, *blocks]

    @rule(first=st.integers(0, CONTENTS), length=st.integers(0, 6), fresh=st.integers(0, 3))
    def begin(self, first: int, length: int, fresh: int) -> None:
        contents = list(range(first, first + length))
        type(self).hits += self._same([len(hits(pool, contents)) for pool in self.pools])
        stock, elastic = (self._take(pool, contents, fresh) for pool in self.pools)
        assert (stock is None) == (elastic is None)
        if stock is not None and elastic is not None:
            assert len({block.block_id for block in elastic}) == len(elastic) == len(stock)
            assert all(block.block_id for block in elastic), "I7: the null block is never handed out"
            self.requests.append((stock, elastic))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.requests:
            at = data.draw(st.integers(0, len(self.requests) - 1))
            for pool, blocks in zip(self.pools, self.requests.pop(at), strict=True):
                pool.free_blocks(reversed(blocks))

    @rule(more=st.integers(1, 5))
    def i8_asking_for_more_than_is_free_fails_and_changes_nothing(self, more: int) -> None:
        for pool in self.pools:
            with pytest.raises(ValueError, match="Cannot get"):
                pool.get_new_blocks(pool.get_num_free_blocks() + more)

    @rule(number=st.integers(0, CONTENTS))
    def forget_one(self, number: int) -> None:
        for pool in self.pools:
            pool.evict_blocks({block.block_id for block in hits(pool, [number])})

    @rule()
    def reset(self) -> None:
        if self._same([pool.reset_prefix_cache() for pool in self.pools]):
            self.pools[1].free_block_queue.forget_unhashed()
            assert granules_of(self.pools[1]).cached_blocks == 0

    @invariant()
    def i9_nobody_can_tell_them_apart(self) -> None:
        type(self).steps += 1
        self.pools[1].free_block_queue.check()
        self._same([pool.get_num_free_blocks() for pool in self.pools])
        self._same([pool.get_usage() for pool in self.pools])
        self._same([removed(pool) for pool in self.pools])
        self._same([[bool(hits(pool, [number])) for number in range(CONTENTS + 6)] for pool in self.pools])


def test_i9_the_elastic_pool_behaves_as_the_stock_one() -> None:
    run_state_machine_as_test(
        TwinMachine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None, database=None)
    )
    record("queue.steps", TwinMachine.steps)
    assert TwinMachine.hits > 100 and TwinMachine.steps > 2000


def cached_pool(budget: int = 8, requests: int = 6) -> Any:
    """Return a pool of 8 granules with contents 0, 1, 2 ... cached; each request filled one granule."""
    pool = elastic_pool(8, budget)
    pool.get_new_blocks(SIZE - 1)  # the rest of granule 0
    for request in range(requests):
        blocks = pool.get_new_blocks(SIZE)
        cache(pool, blocks, range(request * SIZE, (request + 1) * SIZE))
        pool.free_blocks(blocks)
    pool.take_events()
    return pool


def test_kv_events_name_evicted_blocks_oldest_first() -> None:
    pool = cached_pool()
    pool.touch(hits(pool, range(4, 8)))
    pool.free_blocks([pool.get_cached_block(content(number), [0])[0] for number in range(4, 8)])
    settle(pool, 4)
    assert removed(pool) == [*range(4), *range(8, 16)], "granule 2 was hit: it is the youngest"
    assert [len(hits(pool, range(n, n + SIZE))) for n in range(0, 24, SIZE)] == [0, 4, 0, 0, 4, 4]
    assert granules_of(pool).mapped == 4
    pool.free_block_queue.check()


def test_readers_of_a_block_are_notified_before_it_is_evicted() -> None:
    pool = cached_pool()
    told: list[tuple[int, bool]] = []
    (block,) = pool.get_cached_block(content(0), [0])
    pool._reuse_watchers[block.block_id] = lambda b: told.append((b.block_id, b.block_hash is not None))
    settle(pool, 2)
    assert told == [(block.block_id, True)]


def test_over_the_budget_the_pool_is_full_and_hands_out_nothing() -> None:
    pool = elastic_pool(8)
    blocks = pool.get_new_blocks(20)
    settle(pool, 2)
    assert (pool.get_num_free_blocks(), pool.get_usage()) == (0, 1.0)
    with pytest.raises(ValueError, match="Cannot get 1"):
        pool.get_new_blocks(1)
    with pytest.raises(ValueError, match="No free blocks"):
        pool.free_block_queue.popleft()
    assert not pool.reset_prefix_cache()
    pool.free_blocks(blocks)
    settle(pool, 2)
    assert pool.get_num_free_blocks() == 2 * SIZE - 1 and pool.get_usage() == 0.0
    assert pool.reset_prefix_cache(), "everything is free, whatever the pool could hold"


def test_free_blocks_move_with_the_budget_only_when_it_is_settled() -> None:
    pool = elastic_pool(8, budget=2)
    queue = pool.free_block_queue
    before = queue.num_free_blocks
    granules_of(pool).set_budget(5)
    assert queue.num_free_blocks == before
    queue.settle()
    assert queue.num_free_blocks == before + 3 * SIZE and pool.num_gpu_blocks == 5 * SIZE


def test_cached_blocks_are_kept_until_the_budget_is_full() -> None:
    pool = cached_pool(budget=8, requests=6)
    taken = pool.get_new_blocks(SIZE)
    assert removed(pool) == [] and {block.block_id // SIZE for block in taken} == {7}
    pool.get_new_blocks(3)
    assert removed(pool) == [0, 1, 2], "the least recently used is evicted first"


def test_a_stale_granule_is_evicted_whole_and_its_other_blocks_are_handed_out_next() -> None:
    pool = cached_pool(budget=4, requests=3)
    granules_of(pool).stale_turns = 0.5
    taken = pool.get_new_blocks(SIZE + 1)
    assert [block.block_id for block in taken] == [4, 5, 6, 7, 8]
    assert removed(pool) == [5, 6, 7, *range(5)], "what is left first, then what the pool is given"
    pool.free_block_queue.check()
    assert [block.block_id for block in pool.get_new_blocks(3)] == [9, 10, 11]
    assert removed(pool) == [], "they are clean already"
    assert [len(hits(pool, range(n, n + SIZE))) for n in range(0, 12, SIZE)] == [0, 0, SIZE]
    pool.free_block_queue.check()


def test_iteration_continues_after_the_cursor_or_restarts_if_the_cursor_left_the_list() -> None:
    pool = cached_pool(requests=2)
    queue = pool.free_block_queue
    order = list(queue.iter_blocks_after(None))
    assert [block.block_id for block in order] == list(range(4, 12))
    assert list(queue.iter_blocks_after(order[2])) == order[3:]
    pool.touch([order[2]])
    assert list(queue.iter_blocks_after(order[2])) == [*order[:2], *order[3:]]
    assert list(queue.iter_blocks_after(order[-1])) == []


def test_the_whole_contract_of_the_queue() -> None:
    pool = cached_pool(budget=4, requests=3)
    queue = pool.free_block_queue
    assert queue.popleft_n(0) == [] and queue.num_free_blocks == 3 * SIZE
    assert [block.block_id for block in queue.get_all_free_blocks()] == list(range(4, 16))
    block = queue.popleft()
    assert block.block_id == 4, "least recently used"
    queue.append(block)
    assert queue.get_all_free_blocks()[-1] is block
    queue.remove(block)
    with pytest.raises(RuntimeError, match="not in the list"):
        queue.remove(block)
    queue.prepend_n([block])
    assert queue.get_all_free_blocks()[0] is block and queue.popleft() is block
    queue.prepend_n([block])
    queue.append_n([])
    queue.prepend_n([])
    assert queue.num_free_blocks == 3 * SIZE
    with pytest.raises(AssertionError):
        queue.popleft_n(3 * SIZE + 1)


@pytest.mark.parametrize("name", ["num_free_blocks", "num_gpu_blocks", "ref_cnt"])
def test_check_reports_counts_that_do_not_add_up(name: str) -> None:
    pool = cached_pool()
    pool.free_block_queue.check()
    if name == "ref_cnt":
        pool.blocks[5].ref_cnt = 1
    elif name == "num_gpu_blocks":
        pool.num_gpu_blocks += 1
    else:
        pool.free_block_queue.num_free_blocks -= 1
    with pytest.raises(InvariantError, match="does not add up"):
        pool.free_block_queue.check()
