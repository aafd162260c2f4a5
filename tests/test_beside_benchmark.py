"""benchmarks.sharing.beside: its samples and checks, with fake servers whose memory is known to the byte."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from benchmarks.lib.ledger_watch import Moment, Seen
from benchmarks.sharing.beside import A, B, Found, Play, seconds_until

BUDGET, STEP = 1000, 25
LAST = 10  # steps for which a burst runs on once it has all its memory
ANSWERS = [(1, 2), (3,)]


class World:
    """A simulated device. Time passes only inside wait(): with each step, every running burst grows."""

    def __init__(self, **faults: Any) -> None:
        self.faults = faults
        self.at = 0.0
        self.moments: list[Moment] = []
        self.parties = {name: Fake(name, self) for name in (A, B)}
        self.step()

    def step(self) -> None:
        for party in self.parties.values():
            party.grow()
        self.at += 0.02
        seen = {
            p.name: Seen(p.used + p.cached, p.used, p.cached, 0) for p in self.parties.values() if p.alive
        }
        self.moments.append(Moment(self.at, seen, self.free()))

    def free(self) -> int:
        return BUDGET - sum(party.used + party.cached for party in self.parties.values())

    def now(self) -> Moment:
        return self.moments[-1]

    def between(self, begin: float) -> list[Moment]:
        return [moment for moment in self.moments if moment.at >= begin]

    def at_rest(self) -> bool:
        return not any(party.cached for party in self.parties.values()) and not self.faults.get("restless")

    def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        for _ in range(200):
            if holds():
                return True
            self.step()
        return False

    def note(self, text: str) -> None:
        pass


class Fake:
    """A fake server. A burst uses memory and leaves it cached; the other server can take cached memory."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.used = self.cached = 0
        self.alive, self.asked, self.steps_left = True, 0, LAST
        self.bursts: list[tuple[Future[int], int]] = []

    def burst(self, size_bytes: int) -> Future[int]:
        self.bursts.append((Future(), min(size_bytes, self.world.faults.get(f"{self.name}_most", BUDGET))))
        return self.bursts[-1][0]

    def grow(self) -> None:
        other = self.world.parties[B if self.name == A else A]
        if not self.bursts:
            return
        future, size = self.bursts[0]
        if self.used >= size:
            self.steps_left -= 1
            if not self.steps_left:
                self.end(future)
            return
        step = 0 if self.world.faults.get("frozen") and not other.alive else STEP
        own = min(step, self.cached)
        self.cached -= own
        given = min(other.cached, max(0, step - own - self.world.free()))
        other.cached -= 0 if self.world.faults.get("greedy") == other.name else given
        self.used += own + (got := min(step - own, self.world.free() - own))
        if own + got == 0:  # stuck
            self.end(future)

    def end(self, future: Future[int]) -> None:
        self.cached, self.used, self.steps_left = self.cached + self.used, 0, LAST
        self.bursts.pop(0)
        future.set_result(self.world.faults.get("failed", 0))

    def answers(self) -> list[tuple[int, ...]]:
        self.asked += 1
        return ANSWERS if self.asked == 1 else self.world.faults.get(f"{self.name}_later", ANSWERS)

    def flush(self) -> None:
        self.cached = 0

    def kill(self) -> None:
        self.alive, self.used, self.cached, self.bursts = False, 0, 0, []


def played(**faults: Any) -> Found:
    world, found = World(**faults), Found()
    b = world.parties[B]
    Play(world.parties[A], b, world, BUDGET, found).run(b.answers())
    return found


def test_every_scene_records_its_bytes_and_seconds() -> None:
    found = played()
    assert all(found.checks.values()) and len(found.checks) == 12
    samples = found.samples
    assert len(samples["vllm_peak_used_bytes"]) == 2 and len(samples["sglang_peak_used_bytes"]) == 1
    assert samples["sglang_given_bytes"][1] == samples["vllm_given_bytes"][0] == 2 * 750 - BUDGET
    assert 0 < samples["b_dead_after_kill_seconds"][0] < 0.1
    assert 0 < samples["a_grows_after_kill_seconds"][0] < 0.1
    assert samples["a_held_after_kill_bytes"][0] > BUDGET - samples["b_held_at_kill_bytes"][0]
    assert samples["free_idle_bytes"] == [BUDGET] and samples["held_idle_bytes"] == [0]


@pytest.mark.parametrize(
    ("faults", "what"),
    [
        ({"failed": 1}, "all requests succeeded but those of the killed server"),
        ({"restless": True}, "idle servers keep their first granule"),
        ({f"{A}_later": [(1, 2), (4,)]}, "vLLM answers beside SGLang as alone"),
        ({f"{B}_later": [(1, 2), (4,)]}, "SGLang answers beside vLLM as alone"),
        ({f"{A}_most": 450}, "each peak of vllm was above half of what both may hold"),
        ({"frozen": True}, "vLLM grew into the killed server's memory within a second"),
        ({"greedy": A}, "memory moved from vLLM to SGLang"),
        ({"greedy": B}, "memory moved from SGLang to vLLM"),
    ],
)
def test_a_fault_fails_its_check(faults: dict[str, Any], what: str) -> None:
    assert not played(**faults).checks[what]


def test_seconds_count_from_the_kill_to_the_first_moment_that_shows_it() -> None:
    seen = [Moment(at, {A: Seen(size, 0, 0, 0)}) for at, size in ((10.0, 300), (10.5, 400), (10.7, 401))]

    def grown(room: int) -> float:
        return seconds_until(lambda moment: moment.of(A).held > room, seen, 10.0)

    assert grown(400) == pytest.approx(0.7)
    assert grown(401) == -1
