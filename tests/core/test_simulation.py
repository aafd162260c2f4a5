"""The simulation of many owners: its parts, and short scenarios that check the ledger's guarantees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import ideal, scenes, watch
from benchmarks.simulation.clockwork import BELL_SECONDS, Process, World
from benchmarks.simulation.decisions import lease_microseconds
from benchmarks.simulation.scenes import CAPACITY_GRANULES, play
from kvcached_core.errors import InvariantError
from kvcached_core.ledger.policy import shares


@pytest.fixture
def world() -> Iterator[World]:
    """Return a world that is stopped afterwards."""
    world = World()
    yield world
    world.stop()


def test_processes_run_in_the_order_of_the_clock(world: World) -> None:
    seen: list[tuple[str, float]] = []

    def walk(name: str, pause: float) -> None:
        def body(process: Process) -> None:
            while True:
                process.sleep(pause)
                seen.append((name, round(world.now - 1.0, 3)))

        world.spawn(body)

    walk("a", 2.0)
    walk("b", 3.0)
    world.run(7.5)
    assert seen == [("a", 2.0), ("b", 3.0), ("a", 4.0), ("b", 6.0), ("a", 6.0)]
    assert world.now == 7.5


def test_who_is_woken_while_awake_does_not_sleep_next(world: World) -> None:
    times: list[float] = []

    def listen(process: Process) -> None:
        process.sleep(1.0)  # deaf
        process.sleep(None, hears=True)
        times.append(world.now - 1.0)
        process.sleep(None, hears=True)
        times.append(world.now - 1.0)

    listener = world.spawn(listen)

    def call(process: Process) -> None:
        for _ in range(2):
            process.sleep(0.6)
            listener.wake()
            process.sleep(0.6)

    world.spawn(call)
    world.run(10.0)
    assert times == [1.0, pytest.approx(1.8 + BELL_SECONDS)]


def test_what_a_process_raises_ends_the_run(world: World) -> None:
    def fail(process: Process) -> None:
        process.sleep(1.0)
        raise InvariantError("as it should")

    world.spawn(fail)
    with pytest.raises(InvariantError, match="as it should"):
        world.run(10.0)


_owner = st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(1, 50), st.integers(1, 8))


@given(st.lists(_owner, min_size=1, max_size=8), st.integers(1, 100))
@settings(max_examples=300, deadline=None)
def test_the_arbiter_and_the_bisection_find_the_same_shares(
    owners: list[tuple[int, int, int, int]], total: int
) -> None:
    unit = 1 << 20
    claims = [
        shares.Claim(slot, 0, need * unit, need * unit, floor * unit, limit * unit, weight)
        for slot, (need, floor, limit, weight) in enumerate(owners)
    ]
    needs, floors, limits, weights = (np.array(column, dtype=float) for column in zip(*owners, strict=True))
    found = ideal.shares(float(total), needs[None, :], floors, limits, weights)[0]
    of = shares.shares(claims, total * unit)
    assert [of[slot].need / unit for slot in range(len(owners))] == pytest.approx(found, abs=1e-4)


def test_a_scene_is_the_same_each_time() -> None:
    first, second = (play(scenes.bursts(3, 6.0)).series for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert first.finished[-1].sum() > 0


def test_steady_owners_come_to_the_ideal_and_nothing_moves_then() -> None:
    played = play(scenes.steady(10.0))
    late = played.series.seconds > 6.0
    lacking = watch.shortfall(played.series, played.ideal)[late] / CAPACITY_GRANULES
    assert lacking.mean() < 0.01
    edits = played.series.edits.sum(axis=1)[late]
    assert edits[-1] - edits[0] < 50 * 4, "granules go back and forth"


def test_a_floor_is_restored_within_a_second_from_requests_that_go_on_for_long() -> None:
    played = play(scenes.floors(34.0))
    waits = watch.episodes(played.series, played.floors, 0.0)
    assert max(wait.delay_seconds for wait in waits) <= 1.0
    assert all(wait.ended for wait in waits)
    assert played.for_floors > 0


def test_a_contested_lease_is_measured_and_leaves_nothing() -> None:
    found = lease_microseconds(3, 5)
    assert {kind: len(times) for kind, times in found.items()} == {"free": 5, "contested": 5}
    assert min(min(times) for times in found.values()) > 0


def test_the_delay_is_that_of_what_was_due_while_more_becomes_due() -> None:
    seconds = np.arange(6) * 1.0
    line = np.array([[0], [4], [8], [8], [8], [8]])
    ready = np.array([[0], [0], [2], [4], [4], [8]])
    nothing = np.zeros_like(ready)
    seen = watch.Series(seconds, ready, line, nothing, np.ones_like(ready), nothing, nothing, nothing)
    assert watch.episodes(seen, line, 0.0) == [watch.Episode(0, 1.0, 4.0, 3.0, True)]
