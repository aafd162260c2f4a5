"""What the ranks of an engine say to each other; how they take turns is tested in the core."""

from __future__ import annotations

from vllm_kvcached.ranks import gather


def test_an_engine_of_one_rank_speaks_to_itself() -> None:
    assert gather(7) == [7]
