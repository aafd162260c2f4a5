"""benchmarks.engine.sleep: its samples and checks, with fake engines whose memory is known to the byte."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.engine.sleep import Found, play

CAPACITY, GRANULE, WEIGHTS, CONTEXT = 80_000, 16, 16_000, 500


class Fake:
    """A fake engine on a simulated device."""

    def __init__(self, others: list[Fake], **faults: Any) -> None:
        self.others, self.faults = others, faults
        self.cache, self.private = GRANULE, WEIGHTS
        others.append(self)

    def free(self) -> int:
        return CAPACITY - sum(each.cache + each.private for each in self.others)

    def answers(self, salt: str) -> list[list[int]]:
        return [[1, 2], [3]] if salt == "first" else self.faults.get("answers", [[1, 2], [3]])

    def fill(self) -> None:
        self.cache += self.faults.get("grows", self.free())

    def sleep(self) -> float:
        self.cache, self.private = GRANULE * self.faults.get("keeps", 1), CONTEXT
        return 0.5

    def wake(self) -> float:
        for other in self.others:
            if other is not self:
                other.cache = max(GRANULE, other.cache - WEIGHTS)
        self.private = WEIGHTS
        return 1.5

    def owner(self) -> Any:
        return SimpleNamespace(ready_bytes=self.cache, leased_bytes=self.cache, granule_bytes=GRANULE,
                               private_now_bytes=self.faults.get("says", self.private))  # fmt: skip


def played(rounds: int = 2, a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> Found:
    engines: list[Fake] = []
    first, second, found = Fake(engines, **(a or {})), Fake(engines, **(b or {})), Found()
    play(first, second, first.free, rounds, found)
    return found


def test_every_round_records_its_seconds_and_bytes() -> None:
    found = played()
    assert not any(found.broken.values()) and len(found.broken) == 4
    assert found.samples["a_sleep_seconds"] == [0.5, 0.5] and found.samples["a_wake_seconds"] == [1.5, 1.5]
    assert found.samples["a_private_freed_bytes"] == [WEIGHTS - CONTEXT] * 2
    assert found.samples["free_before_sleep_bytes"][0] == 0
    freed = found.samples["a_cache_freed_bytes"][0] + WEIGHTS - CONTEXT
    assert found.samples["free_asleep_bytes"][0] == freed
    assert {len(values) for values in found.samples.values()} == {2}


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ({"keeps": 2}, {}, "A sleeps with its null granule alone"),
        ({}, {"grows": 100}, "B grew into what A had"),
        ({"answers": [[1, 2], [4]]}, {}, "A answers as before it slept"),
    ],
)
def test_a_failed_check_is_counted(a: dict[str, Any], b: dict[str, Any], what: str) -> None:
    found = played(1, a, b)
    assert [name for name, count in found.broken.items() if count] == [what]


def test_ledger_bytes_that_the_driver_does_not_confirm_are_a_failed_check() -> None:
    engines: list[Fake] = []
    first, second, found = Fake(engines), Fake(engines), Found()
    play(first, second, lambda: first.free() // 2, 1, found)
    assert found.broken["the driver has what A says it freed"] == 1
