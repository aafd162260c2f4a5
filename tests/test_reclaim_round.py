"""benchmarks.sharing.reclaim_round: how a round's stages are computed from readings of the ledger."""

from __future__ import annotations

import pytest

from benchmarks.sharing.reclaim_round import STAGES, Row, driver_error_bytes, measure, parts, token_rates

GIB = 1000  # bytes of a GiB in these tests; the taker wants ten GiB
SAID_AT = 100.0
ROUND = [
    Row(99.9, asked_until_ms=7, target=500, ordered=3, giver_ready=16_000, taker_ready=1, free=400),
    Row(100.01, 7, 500, 3, 16_000, 401, 0),  # the taker gets free memory first
    Row(100.02, 1101, 6400, 3, 16_000, 401, 0),
    Row(100.03, 1101, 6400, 12, 16_000, 401, 0),
    Row(100.04, 1101, 6400, 12, 11_000, 401, 5_000),
    Row(100.05, 1101, 6400, 12, 11_000, 1_001, 4_400),
    Row(100.06, 1101, 6400, 12, 6_400, 1_001, 9_000),
    Row(100.07, 1101, 6400, 12, 6_400, 10_001, 0),
    Row(100.09, 1101, 6400, 12, 5_000, 10_001, 1_400),  # given after the taker has everything: not counted
]


def test_each_stage_is_timed_from_the_wish_to_its_first_reading() -> None:
    seconds = measure(ROUND, SAID_AT, 10 * GIB, GIB)
    assert [round(seconds[stage], 3) for stage in STAGES] == [0.02, 0.03, 0.04, 0.06, 0.05, 0.07]
    assert seconds["given"] == 9_600


def test_the_parts_of_a_round_add_up_to_the_whole() -> None:
    seconds = measure(ROUND, SAID_AT, 10 * GIB, GIB)
    assert sum(parts(seconds).values()) == pytest.approx(seconds["all_ready"])


def test_an_earlier_ask_that_has_lapsed_is_not_taken_for_a_new_one() -> None:
    never_asked = [row._replace(asked_until_ms=7) for row in ROUND]
    with pytest.raises(ValueError, match="never seen: asked"):
        measure(never_asked, SAID_AT, 10 * GIB, GIB)


def test_a_round_whose_taker_never_had_all_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="never seen: all_ready"):
        measure(ROUND[:-2], SAID_AT, 10 * GIB, GIB)


def test_a_round_without_a_reading_before_the_wish_is_refused() -> None:
    with pytest.raises(ValueError, match="before the wish"):
        measure(ROUND[1:], SAID_AT, 10 * GIB, GIB)


def test_the_drivers_free_memory_is_compared_with_given_less_taken_bytes() -> None:
    assert driver_error_bytes(ROUND, SAID_AT) == {"least": 0, "most": 0, "at_the_end": 0}
    late = [*ROUND[:-1], ROUND[-1]._replace(free=900)]
    assert driver_error_bytes(late, SAID_AT)["least"] == -500


def test_tokens_and_pauses_are_counted_on_either_side_of_the_wish() -> None:
    steps = [(99.6, 8), (99.8, 8), (100.1, 8), (100.45, 4), (100.6, 8)]
    rates = token_rates(steps, SAID_AT, window_seconds=0.5)
    assert rates["control_tokens_per_second"] == 32
    assert rates["taking_tokens_per_second"] == 24
    assert rates["control_longest_pause_seconds"] == pytest.approx(0.2)
    assert rates["taking_longest_pause_seconds"] == pytest.approx(0.35)
