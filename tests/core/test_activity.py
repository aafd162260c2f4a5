"""An engine's counts for the ledger, and waiting in short turns."""

from __future__ import annotations

from kvcached_core.scheduler.activity import ActivityReport
from kvcached_core.scheduler.polling import POLL_SECONDS, poll_while
from kvcached_core.units import Size


def test_counts_are_written_only_when_one_has_changed() -> None:
    written: list[tuple[int, int, bool, int]] = []
    report = ActivityReport(lambda *counts: written.append(counts))
    report.set_busy(False, 2.0)
    report.publish(0, 0)
    report.set_busy(False, 5.0)
    report.publish(0, 0)
    assert written == [(0, 0, False, 2000)], "idle since the first time"
    report.set_busy(True, 6.0)
    report.publish(3, 1)
    report.set_busy(False, 0.0)
    report.publish(3, 1)
    assert written[1:] == [(3, 1, True, 0), (3, 1, False, 1)], "0 would say busy"


def test_a_rank_that_does_not_report_writes_nothing() -> None:
    report = ActivityReport(None)
    report.set_busy(True, 1.0)
    report.publish(1, 1)


def test_waiting_ends_with_the_condition_or_the_time() -> None:
    now, slept = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now, slept
        now, slept = now + seconds, slept + 1

    assert poll_while(lambda: slept < 3, 1.0, lambda: now, sleep) == 3 * POLL_SECONDS
    assert poll_while(lambda: True, 4 * POLL_SECONDS, lambda: now, sleep) == 4 * POLL_SECONDS
    assert poll_while(lambda: True, 0.0, lambda: now, sleep) == 0.0


def test_a_size_takes_whole_units() -> None:
    assert [Size(7).units_of(100, 4), Size(8).units_of(100, 4), Size(percent=50.0).units_of(100, 30)] == [
        2,
        2,
        2,
    ]
