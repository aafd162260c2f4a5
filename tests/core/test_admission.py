"""Waiting to start, on a fake clock; and the memory that an engine shows in the ledger while it loads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.errors import BusyError, CapacityError
from kvcached_core.ledger.start_queue import Turn
from kvcached_core.startup.admission import (
    RETRY_SECONDS,
    LoadingReporter,
    set_floor,
    wait_for_admission,
    wait_for_doorbell,
)
from kvcached_core.units import GIB

ADMITTED = Turn(True)
MEMORY = MemoryInfo(3 * GIB, 80 * GIB)


class Waiter:
    """An account that gives prepared answers, with a clock that moves only while it waits."""

    def __init__(self, answers: Iterator[Turn | Exception], bell: Callable[[float], bool]) -> None:
        self.now = 0.0
        self.asked_at: list[float] = []
        self.claims: set[tuple[int, int, MemoryInfo]] = set()
        self.waits: list[float] = []
        self.events: list[str] = []
        self._answers = answers
        self._bell = bell

    def ask_to_start(self, private_bytes: int, floor_bytes: int, memory: MemoryInfo) -> Turn:
        self.events.append("ask")
        self.asked_at.append(self.now)
        self.claims.add((private_bytes, floor_bytes, memory))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def acknowledge(self) -> None:
        self.events.append("acknowledge")

    def drain(self) -> None:
        self.events.append("drain")

    def fileno(self) -> int:
        return 77

    def wait(self, fd: int, seconds: float) -> None:
        assert fd == 77
        self.waits.append(seconds)
        self.now += 0.001 if self._bell(self.now) else seconds

    def start(self, timeout_seconds: float = 300.0) -> None:
        wait_for_admission(
            self, lambda: MEMORY, 15 * GIB, 2 * GIB, timeout_seconds, lambda: self.now, self.wait
        )


def waiter(*answers: Turn | Exception, bell: Callable[[float], bool] = lambda now: False) -> Waiter:
    """Return an account that gives these answers, the last one for ever."""

    def forever() -> Iterator[Turn | Exception]:
        yield from answers
        while True:
            yield answers[-1]

    return Waiter(forever(), bell)


def test_with_room_an_engine_starts_without_waiting() -> None:
    account = waiter(ADMITTED)
    account.start(0)
    assert account.waits == [] and account.claims == {(15 * GIB, 2 * GIB, MEMORY)}


def test_the_bell_is_drained_before_asking_so_that_no_ring_is_lost() -> None:
    account = waiter(Turn(False), ADMITTED)
    account.start()
    assert account.events == ["drain", "acknowledge", "ask"] * 2


def test_without_a_ring_it_asks_five_times_a_second_and_no_more() -> None:
    account = waiter(*[Turn(False)] * 10, ADMITTED)
    account.start()
    gaps = [later - earlier for earlier, later in zip(account.asked_at, account.asked_at[1:], strict=False)]
    assert gaps == pytest.approx([RETRY_SECONDS] * 10)


def test_a_ring_is_answered_at_once() -> None:
    account = waiter(Turn(False), ADMITTED, bell=lambda now: True)
    account.start()
    assert account.now == pytest.approx(0.001)


def test_a_busy_ledger_is_asked_again() -> None:
    account = waiter(BusyError("busy"), BusyError("busy"), ADMITTED)
    account.start()
    assert len(account.asked_at) == 3


def test_after_the_time_it_is_refused_with_the_numbers_and_what_to_do() -> None:
    account = waiter(Turn(False, 2, 9 * GIB, 3 * GIB))
    with pytest.raises(CapacityError) as error:
        account.start(60)
    assert account.now == pytest.approx(60)
    for part in ("within 60 s", "takes 15 GiB outside", "floor of 2 GiB", "3 GiB are free",
                 "9 GiB are missing", "2 started before it", "kvcached.start_seconds", "kvctl limit",
                 "kvcached.start_size"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize("answer", [Turn(False, 0, GIB, 0), BusyError("busy")])
def test_without_time_to_wait_it_asks_once(answer: Turn | Exception) -> None:
    account = waiter(answer)
    with pytest.raises(CapacityError, match="within 0 s"):
        account.start(0)
    assert len(account.asked_at) == 1


def test_what_can_never_fit_is_refused_at_once() -> None:
    account = waiter(CapacityError("40 GiB of 24 GiB"))
    with pytest.raises(CapacityError, match="40 GiB of 24 GiB"):
        account.start()
    assert account.waits == []


def test_it_says_what_it_waits_for_at_first_and_every_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvcached_core.startup.admission")
    turns = [Turn(False, 0, GIB, 3 * GIB)] * 60
    account = waiter(*turns, ADMITTED)
    account.start()  # 12 s
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4 and "admitted after 12.0 s" in said[-1]
    assert all("1 GiB are missing, no engine is ahead of it" in line for line in said[:-1])


def test_waiting_ends_with_the_bell() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"\1")
        wait_for_doorbell(reader, 60)
    finally:
        os.close(reader)
        os.close(writer)


class Floors:
    """An account whose ledger is busy for a while."""

    def __init__(self, busy_times: int) -> None:
        self.busy_times = busy_times
        self.floor_bytes = 0

    def set_floor_bytes(self, floor_bytes: int) -> None:
        if self.busy_times:
            self.busy_times -= 1
            raise BusyError("busy")
        self.floor_bytes = floor_bytes


def test_the_floor_is_set_as_soon_as_the_ledger_is_not_busy() -> None:
    account = Floors(3)
    slept: list[float] = []
    set_floor(account, GIB, 60, lambda: 0.0, slept.append)
    assert account.floor_bytes == GIB and len(slept) == 3
    with pytest.raises(BusyError):
        set_floor(Floors(1), GIB, 0, lambda: 0.0, slept.append)


class Shown:
    """An account that records the calls it gets."""

    def __init__(self, fails: bool = False) -> None:
        self.told: list[tuple[int, int]] = []
        self.acknowledged = 0
        self.twice = threading.Event()
        self.failed = threading.Event()
        self._fails = fails

    def acknowledge(self) -> None:
        self.acknowledged += 1
        if self._fails:
            self.failed.set()
            raise OSError("gone")

    def publish(self, mapped_bytes: int, private_now_bytes: int) -> None:
        self.told.append((mapped_bytes, private_now_bytes))
        if len(self.told) == 2:
            self.twice.set()


def test_while_it_loads_an_engine_shows_what_it_took_and_heeds_its_tools() -> None:
    account, sizes = Shown(), iter(range(1000))
    loading = LoadingReporter(account, lambda: 5, lambda: next(sizes))
    loading.start()
    assert account.twice.wait(10)
    loading.stop()
    told = list(account.told)
    assert told[:2] == [(5, 0), (5, 1)] and account.acknowledged == len(told)
    loading.stop()
    assert account.told == told


def test_a_ledger_that_fails_does_not_stop_the_loading(caplog: pytest.LogCaptureFixture) -> None:
    account = Shown(fails=True)
    loading = LoadingReporter(account, lambda: 0, lambda: 0)
    loading.start()
    assert account.failed.wait(10)
    loading.stop()
    assert "is no longer reported" in caplog.text and account.told == []


def test_loading_that_never_began_may_be_stopped() -> None:
    LoadingReporter(Shown(), lambda: 0, lambda: 0).stop()
