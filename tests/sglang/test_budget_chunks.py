"""Prompts computed in chunks, and which requests may begin behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sglang.elastic import engine
from tests.sglang.test_budget import KIND, started

_ASKED: dict[str, Any] = {"extend_input_len": 16, "total_tokens": 32, "input_tokens": 16, "chunk_limit": 128,
                          "max_new_tokens": 1, "swa_host_hit_length": 0}  # fmt: skip


_ENDLESS: dict[str, Any] = {"extend_input_len": 16, "max_new_tokens": 1, "chunk_limit": 128}


@pytest.mark.parametrize(("left_over", "begins"), [(0, True), (1, False)])
def test_no_request_begins_behind_a_prompt_that_is_cut_for_lack_of_memory(
    tmp_path: Path, left_over: int, begins: bool
) -> None:
    """SGLang allows one unfinished prompt at a time; memory may come between two looks at the budget."""
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 1)
        made.limit(5)
        budget = twins.elastic.create_prefill_budget(made.cache)
        chunk = budget.available_chunk_tokens(512)
        assert chunk is not None and 0 < chunk < 512
        assert (
            budget.fit_chunk(extend_input_len=chunk + left_over, max_new_tokens=1, chunk_limit=chunk) == chunk
        )
        budget.reserve(chunk, 0)
        made.limit(40)
        made.memory.settle()
        fits, _ = budget.check_prefill(**_ASKED)
        assert fits == begins
        assert budget.can_allocate_prefill(paged_input=32, **_ENDLESS) == begins


def test_no_request_begins_behind_a_prompt_that_waits_in_this_step(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 2)
        made.limit(1)
        budget = twins.elastic.create_prefill_budget(made.cache)
        assert budget.available_chunk_tokens(512) is None
        made.limit(40)
        made.memory.settle()
        assert budget.check_prefill(**_ASKED) == (False, None)
        assert not budget.can_allocate_prefill(paged_input=32, **_ENDLESS)
        again = twins.elastic.create_prefill_budget(made.cache)
        assert again.check_prefill(**_ASKED)[0]


def test_a_chunk_takes_its_requests_state_before_another_request_begins(tmp_path: Path) -> None:
    with engine(tmp_path, KIND.page_size) as made:
        twins = started(made, 1)
        budget = twins.elastic.create_prefill_budget(made.cache)
        assert budget.fit_chunk(extend_input_len=600, max_new_tokens=1, chunk_limit=128) == 128
        assert budget.can_allocate_prefill(paged_input=144, **_ENDLESS)
        budget.reserve(128, 0)
        assert not budget.can_allocate_prefill(paged_input=16, **_ENDLESS)
