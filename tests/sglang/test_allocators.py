"""The elastic allocators against stock: the same calls, the same sizes, and only slots of mapped granules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.sglang.elastic import IDLE_SECONDS, Engine, engine
from tests.sglang.twins import KINDS, STRADDLING, Kind, Twins


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """Every kind of pool."""
    yield request.param


def with_requests(made: Engine, kind: Kind, tokens: int) -> Twins:
    """Return an engine and its stock twin with four requests of this many tokens."""
    twins = Twins(made, kind)
    for _ in range(4):
        twins.begin(tokens)
    return twins


MOVE = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 300)),
    st.tuples(st.just("begin"), st.integers(1, 20)),
    st.tuples(st.just("decode"), st.integers(1, 20)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("keep"), st.integers(0, 9)),
    st.tuples(st.just("limit"), st.integers(4, 14)),
    st.tuples(st.just("idle"), st.integers(0, 3)),
    st.tuples(st.just("turn"), st.just(0)),
    st.tuples(st.just("flush"), st.just(0)),
)


def move(twins: Twins, name: str, number: int) -> None:
    """Make one move of the test."""
    if name == "begin":
        twins.begin(number)
    elif name == "decode":
        for _ in range(number):
            twins.decode()
    elif name in ("end", "keep"):
        twins.end(number, keep=name == "keep")
    elif name == "limit":
        twins.engine.limit(number)
    elif name == "idle":
        if not twins.requests:
            twins.engine.idle(float(number))
    elif name == "turn":
        twins.engine.turn()
    else:
        twins.flush()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVE, max_size=25))
@example(moves=[*[("begin", tokens) for tokens in (1, 1, 209, 300)], ("limit", 4), ("flush", 0)])
def test_i5_i9_slots_are_counted_as_in_stock_and_have_memory(
    kind: Kind, tmp_path: Path, moves: list[tuple[str, int]]
) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = Twins(made, kind)
        for name, number in moves:
            move(twins, name, number)
            twins.check()


@pytest.mark.parametrize("page_size", [1, 16])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVE, max_size=25))
def test_a_page_across_two_physical_pages_is_never_handed_out(
    page_size: int, tmp_path: Path, moves: list[tuple[str, int]]
) -> None:
    kind = STRADDLING._replace(page_size=page_size)
    with engine(tmp_path, page_size) as made:
        twins = Twins(made, kind)
        assert twins.elastic.page_pool.geometry.waste > 0
        for name, number in moves:
            move(twins, name, number)
            twins.check()


def test_memory_is_mapped_with_use_and_given_back_when_idle(kind: Kind, tmp_path: Path) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = Twins(made, kind)
        assert (made.mapped, made.held()) == (1, 1)
        for _ in range(4):
            twins.begin(300)
        assert made.mapped == made.held() == 10  # 1200 slots of 128 in a granule
        while twins.requests:
            twins.end(0, keep=False)
        made.idle()
        assert made.held() == 10
        made.idle(IDLE_SECONDS + 0.1)
        assert (made.mapped, made.held()) == (1, 1)
        twins.check()


def test_i2_a_lower_limit_evicts_cached_slots_first_and_then_retracts_requests(
    kind: Kind, tmp_path: Path
) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = with_requests(made, kind, 280)
        twins.end(0, keep=True)
        limit = made.mapped - 1
        made.limit(limit)
        twins.decode()
        made.turn()
        assert made.held() == limit and len(twins.requests) == 3 and not made.cache.lent
        made.limit(4)
        twins.decode()
        made.turn()
        assert made.held() <= 4 and len(twins.requests) == 1
        twins.check()


def test_the_last_request_is_never_retracted(kind: Kind, tmp_path: Path) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = Twins(made, kind)
        twins.begin(300)
        made.limit(1)
        for _ in range(40):
            twins.decode()
        assert len(twins.requests) == 1 and len(twins.requests[0][1]) == 340
        twins.check()


def test_a_request_is_admitted_only_below_the_limit(kind: Kind, tmp_path: Path) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = Twins(made, kind)
        twins.begin(200)
        made.limit(3)
        twins.begin(300)
        assert len(twins.requests) == 1
        made.limit(8)
        twins.begin(300)
        assert len(twins.requests) == 2


def test_flushed_memory_is_reused_at_once_and_given_back_when_idle(kind: Kind, tmp_path: Path) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = with_requests(made, kind, 300)
        held, created = made.held(), made.memory.stats().created
        twins.flush()
        assert made.mapped == made.held() == held > 1
        twins.begin(300)
        twins.check()
        assert made.memory.stats().created == created  # no memory had to be created
        twins.flush()
        made.idle(IDLE_SECONDS + 0.1)
        assert made.mapped == made.held() == 1
        twins.begin(300)
        twins.check()


def test_flushed_memory_is_given_back_at_once_for_a_lower_limit(kind: Kind, tmp_path: Path) -> None:
    with engine(tmp_path, kind.page_size) as made:
        twins = with_requests(made, kind, 300)
        twins.flush()
        made.limit(2)
        made.idle()
        assert made.mapped == made.held() == 2
        twins.check()
