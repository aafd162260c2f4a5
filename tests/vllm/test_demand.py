"""The predicted demand of a scheduler, compared with the blocks that vLLM's scheduler then takes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from tests.vllm.engines import BLOCK_TOKENS, finish_step, request, scheduler, vllm_config
from vllm_kvcached.demand import Demand

BLOCKS = 96


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of every scheduler in this file."""
    return vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def stock(config: Any) -> Iterator[Any]:
    """A stock scheduler with all its memory."""
    made = scheduler(Scheduler, config, BLOCKS)
    yield made
    made.shutdown()


def used(of: Any) -> int:
    """Return the blocks that requests hold."""
    pool = of.kv_cache_manager.block_pool
    return int(pool.num_gpu_blocks - pool.get_num_free_blocks())


@pytest.mark.parametrize("seed", range(4))
def test_no_step_takes_more_blocks_than_predicted(stock: Any, seed: int) -> None:
    chance, demand = random.Random(seed), Demand(stock)
    shared = list(range(100, 180))
    tight = 0
    for step in range(250):
        while step < 200 and chance.random() < 0.4:
            own = [chance.randrange(500) for _ in range(chance.randrange(1, 150))]
            prompt = [*shared[: chance.randrange(81)], *own]
            stock.add_request(request(prompt, chance.randrange(1, 60)))
        bound, before = demand.next_blocks(), used(stock)
        output = stock.schedule()
        taken = used(stock) - before
        assert taken <= bound, f"step {step} took {taken} blocks, and {bound} were thought to do"
        tight += bound and taken * 4 >= bound
        demand.note_step(output)
        finish_step(stock, output)
    assert tight > 5, "a bound that is never near says nothing"


def test_an_idle_scheduler_needs_nothing(stock: Any) -> None:
    demand = Demand(stock)
    assert (
        demand.next_blocks(),
        demand.is_short(),
        demand.request_over_free_blocks(),
        demand.request_over_limit(0),
    ) == (0, False, None, None)


def test_the_head_of_the_queue_needs_its_whole_prompt_and_the_watermark(stock: Any) -> None:
    demand = Demand(stock)
    stock.add_request(request(100, 1))
    assert demand.next_blocks() == 7 + stock.kv_cache_manager.watermark_blocks


def test_one_step_of_the_queue_counts_if_nothing_runs_and_two_otherwise(
    stock: Any,
) -> None:
    demand, prompts = (
        Demand(stock),
        (10, 100, 10, 200),
    )  # 64 tokens a step: one step reads up to the second prompt, two steps up to the last
    for tokens in prompts:
        stock.add_request(request(tokens, 1))
    assert demand.next_blocks() == 1 + 7 + stock.kv_cache_manager.watermark_blocks
    while stock.has_unfinished_requests():
        finish_step(stock, stock.schedule())
    stock.add_request(request(BLOCK_TOKENS, 10))
    finish_step(stock, stock.schedule())
    running = demand.next_blocks()
    for tokens in prompts:
        stock.add_request(request(tokens, 1))
    assert demand.next_blocks() == running + 1 + 7 + 1 + 13 + stock.kv_cache_manager.watermark_blocks


def test_a_long_queue_costs_no_more_than_a_short_one(stock: Any) -> None:
    for _ in range(300):
        stock.add_request(request(1, 1))
    assert Demand(stock).next_blocks() == 64 + stock.kv_cache_manager.watermark_blocks


def test_a_step_is_short_if_a_request_could_not_grow(stock: Any) -> None:
    demand, pool = Demand(stock), stock.kv_cache_manager.block_pool
    stock.add_request(request(BLOCK_TOKENS, 10))
    finish_step(stock, stock.schedule())
    assert not demand.is_short()
    held = pool.get_new_blocks(pool.get_num_free_blocks())
    assert demand.is_short()
    pool.free_blocks(held)
    assert not demand.is_short()


def test_a_step_is_short_if_only_blocks_are_missing_to_admit_the_queue(stock: Any) -> None:
    demand, pool = Demand(stock), stock.kv_cache_manager.block_pool
    stock.add_request(request(BLOCK_TOKENS, 10))
    finish_step(stock, stock.schedule())
    for _ in range(3):
        stock.add_request(request(2 * BLOCK_TOKENS, 1))
    needed = 1 + 2 * 2  # the running request's, and two prompts that a step of 64 tokens prefills
    held = pool.get_new_blocks(pool.get_num_free_blocks() - needed)
    assert not demand.is_short()
    more = pool.get_new_blocks(1)
    assert demand.is_short()
    stock.max_num_running_reqs = 1
    assert not demand.is_short(), "nobody can be admitted, so nobody waits for memory"
    pool.free_blocks(more + held)


def test_requests_over_the_limit_and_over_the_free_blocks_are_found(stock: Any) -> None:
    demand, pool = Demand(stock), stock.kv_cache_manager.block_pool
    head = request(100, 1)
    name = head.request_id
    stock.add_request(head)
    assert demand.request_over_limit(7) is None and demand.request_over_limit(6) is head
    assert demand.request_over_free_blocks() is None
    held = pool.get_new_blocks(pool.get_num_free_blocks() - 6)
    assert demand.request_over_free_blocks() is head and demand.is_short()
    pool.free_blocks(held[:1])
    assert demand.request_over_free_blocks() is None and not demand.is_short()
    output = stock.schedule()
    demand.note_step(output)
    assert demand.request_over_free_blocks() is None and output.num_scheduled_tokens == {name: 64}


def test_a_request_with_lookahead_needs_room_for_it_too(stock: Any) -> None:
    stock.num_lookahead_tokens = 5
    demand, head = Demand(stock), request(96, 1)
    stock.add_request(head)
    assert demand.request_over_limit(6) is head, (
        "vLLM wants 96 + 5 slots before it begins with the last tokens"
    )
    assert demand.next_blocks() == 7 + stock.kv_cache_manager.watermark_blocks
    stock.max_model_len = 98
    assert Demand(stock).request_over_limit(7) is None


def test_running_requests_grow_and_waiting_requests_do_not(stock: Any) -> None:
    demand = Demand(stock)
    stock.add_request(request(100, 9))
    assert demand.growth_blocks() == 0 < demand.next_blocks()
    output = stock.schedule()
    demand.note_step(output)
    finish_step(stock, output)
    assert demand.growth_blocks() == 1 + 64 // BLOCK_TOKENS, "its next chunk may be as long as a step"
    for _ in range(2):
        output = stock.schedule()
        demand.note_step(output)
        finish_step(stock, output)
    assert demand.growth_blocks() == demand.next_blocks() == 1


def test_a_request_that_vllm_put_aside_is_the_next_to_be_admitted(stock: Any) -> None:
    aside, waits = request(60, 1), request(10, 1)
    stock.add_request(waits)
    stock.skipped_waiting = create_request_queue(stock.policy)  # as in vLLM 0.30
    stock.skipped_waiting.add_request(aside)
    demand = Demand(stock)
    assert demand.next_blocks() == 4 + 1 + stock.kv_cache_manager.watermark_blocks
    assert demand.request_over_limit(3) is aside and demand.request_over_limit(4) is None
    assert demand.request_over_limit(0) is aside
    stock.skipped_waiting.pop_request()
    assert demand.request_over_limit(0) is waits
