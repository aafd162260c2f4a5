"""Exchange of values between ranks. Tests of the core cover the order in which ranks wait."""

from __future__ import annotations

from vllm_kvcached.ranks import gather


def test_an_engine_of_one_rank_gathers_its_own_value() -> None:
    assert gather(7) == [7]
