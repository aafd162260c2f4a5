"""Demand: the pages that requests will take, by the scheduler's queues."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_kvcached.demand import Demand
from tests.sglang.elastic import IDLE_SECONDS, Cache, engine, request, scheduler
from tests.sglang.test_budget import started

PAGE = 16


class Mode:
    """The forward mode of a batch that computed prompts."""

    @staticmethod
    def is_extend() -> bool:
        """Say yes."""
        return True


def test_a_prompt_is_counted_once_before_and_after_its_request_starts_to_decode() -> None:
    fake = scheduler(PAGE, Cache())
    fake.running_batch.reqs = [request() for _ in range(3)]
    fake.last_batch = SimpleNamespace(reqs=[request(), request()], forward_mode=Mode)
    demand = Demand(fake)
    assert demand.running == 5
    fake.running_batch.reqs = fake.running_batch.reqs + fake.last_batch.reqs
    assert demand.running == 5
    fake.running_batch = fake.last_batch
    assert demand.running == 2
    fake.last_batch = SimpleNamespace(reqs=[], forward_mode=Mode)
    assert demand.running == 2
    fake.max_running_requests = 5
    fake.waiting_queue = [request(prompt=2 * PAGE)] * 9
    assert demand.next_pages() == 2 + 3 * (1 + 2), "as many as SGLang lets run"


def test_one_step_of_the_queue_counts_if_nothing_runs_and_two_otherwise() -> None:
    fake = scheduler(PAGE, Cache())
    demand = Demand(fake)
    fake.waiting_queue = [request(prompt=2 * PAGE)] * 40
    one = demand._step_tokens // (2 * PAGE)
    assert 2 * one < 40 and demand.next_pages() == one * (1 + 2) and not demand.is_computing
    fake.running_batch.reqs = [request()]
    assert demand.next_pages() == 1 + 2 * one * (1 + 2) and demand.is_computing


def test_remaining_pages_follow_sglangs_estimate() -> None:
    fake = scheduler(PAGE, Cache())
    demand = Demand(fake)
    assert demand.remaining_pages() == demand.next_pages() == 0
    fake.running_batch.reqs = [
        request(prompt=100, generated=20, generates=180),  # 160 tokens
        request(prompt=100, generated=20, generates=180, ignore_eos=False),  # half of them: see scheduler()
        request(prompt=100, generated=200, generates=180),  # none
    ]
    assert demand.remaining_pages() == 3 + 10 + 5
    fake.running_batch.reqs = [request(generates=1 << 30)]
    assert demand.remaining_pages() == 1 + 4096 // PAGE, "no more than SGLang counts on"
    fake.running_batch.reqs = []
    fake.waiting_queue = [request(prompt=100, generated=12, generates=28)] * 10  # 112 tokens and 16
    assert demand.remaining_pages() == 10 * (7 + 1)


@pytest.mark.parametrize("waiting", [60, 64, 65, 1000])
def test_waiting_requests_beyond_the_first_count_like_them_up_to_the_running_maximum(waiting: int) -> None:
    fake = scheduler(PAGE, Cache())
    fake.max_running_requests = 500
    fake.waiting_queue = [request(prompt=160, generates=16)] * waiting
    assert Demand(fake).remaining_pages() == min(waiting, 500) * 11
    fake.max_running_requests = 50
    assert Demand(fake).remaining_pages() == 50 * 11


def test_idle_memory_that_requests_will_take_is_kept(tmp_path: Path) -> None:
    with engine(tmp_path, PAGE) as made:
        twins = started(made, 4)
        assert made.held() == 9  # 4 x 17 pages, 8 in a granule
        while len(twins.requests) > 1:
            twins.end(0, keep=False)
        running = made.scheduler.running_batch
        # It holds 17 pages of three granules, and granule 0 is never given up: 14 more pages are there.
        for left, expected in ((40 * PAGE, 8), (24 * PAGE, 6), (0, 4)):
            for _ in range(3):
                running.reqs = [request(generates=left)]
                made.now += IDLE_SECONDS + 0.1
                made.memory.settle()
                made.turn()
            assert made.held() == expected
        assert made.mapped == 4 and len(twins.requests) == 1
        twins.check()
