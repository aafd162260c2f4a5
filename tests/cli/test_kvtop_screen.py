"""The lines that kvtop shows: their content, and that they fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from devkit.ledger_scene import CAST, GPUS, GRANULE, Part, crowd, play, put, sampler
from kvcached_core.ledger import Runtime
from kvctl.kvtop.sampling import BUCKET_SECONDS, BUCKETS, PeakHistory
from kvctl.kvtop.screen import ViewState, rank_keys, screen_lines
from tests.ledger.helpers import die


def lines(runtime: Runtime, width: int = 80, height: int | None = None, **view: Any) -> list[str]:
    """Return the lines for the current ledgers."""
    sample = sampler(runtime).sample()
    return [line.plain.rstrip() for line in screen_lines(sample, ViewState(**view), width, height)]


def test_a_device_and_its_engines(runtime: Runtime) -> None:
    accounts = play(runtime)
    shown = lines(runtime, interactive=False)
    assert shown[0] == "kvtop 0.1.0  12:00:00  2 devices  5 ranks"
    assert shown[1].startswith(f"0 {GPUS[0]}  GPU Memory Usage: 64.3 GiB / 80.0 GiB (80.4%)  ")
    bar = shown[2]
    # 80 cells are 80 GiB: the engines have 30.75, 8.22 and 6.31, other processes 19.
    assert (len(bar), bar.count("▞"), bar.count("·")) == (80, 19, 16)
    assert shown[3].split("  ")[1:5] == ["KV 45.3G", "other 19G", "free 15.7G", "outside 1G"]
    name, known, more = shown[4:7]
    assert re.fullmatch(r"  █ llama-70b +0 busy       █+┊█+▓+░·+│ +30.8G/40G", name)
    assert known == "     Prealloc: 768.0 MiB | Used: 30.0 GiB / 40.0 GiB (75.0%) | Free: 9.2 GiB"
    assert more == "     requests 21.9G  cached 8.12G  stranded -  outside KV 6G  demand -  asked -"
    text = "\n".join(shown)
    assert "short" in text and "demand 3G" in text and "asked 4.31G" in text and "over limit" in text
    assert all(account.slot >= 0 for account in accounts)


@pytest.mark.parametrize("count", [1, 2, 7, 32])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10), (20, 5)])
def test_the_lines_fit_every_size_and_include_the_selected_rank(
    runtime: Runtime, count: int, width: int, height: int
) -> None:
    accounts = play(runtime, crowd(count))
    sample = sampler(runtime).sample()
    for key in rank_keys(sample, ViewState()):
        shown = screen_lines(sample, ViewState(selected=key), width, height)
        assert len(shown) <= height and all(line.cell_len <= width for line in shown)
        assert sum(line.plain.startswith(">") for line in shown) == 1
    assert len(accounts) == count == len(rank_keys(sample, ViewState()))


def test_a_higher_terminal_shows_more_details(runtime: Runtime) -> None:
    accounts = play(runtime, crowd(5))
    counts = [sum("Prealloc" in line for line in lines(runtime, 80, height)) for height in (60, 24, 14, 13)]
    assert counts == [5, 5, 5, 0] and len(accounts) == 5


@pytest.mark.parametrize(
    "state", ["busy", "idle", "asked", "over limit", "short", "waiting", "starting", "ended"]
)
def test_every_state_has_a_name(runtime: Runtime, state: str) -> None:
    (account,) = play(runtime, (Part("one", "m", 0, 4, 4, 4),))
    words = {
        "busy": {"busy": 1}, "idle": {"idle_since_ms": 5}, "short": {"demand_bytes": GRANULE},
        "asked": {"target_bytes": GRANULE, "asked_until_ms": 1 << 60}, "ended": {},
        "over limit": {"limit_wanted": GRANULE}, "waiting": {"starting_bytes": 1},
        "starting": {"granule_bytes": 0},
    }[state]  # fmt: skip
    put(runtime, 0, account.slot, **words)
    if state == "ended":
        die(account)
    assert f" {state} " in lines(runtime)[4]


def test_without_colours_and_in_ascii_the_segments_still_differ(runtime: Runtime) -> None:
    accounts = play(runtime)
    shown = lines(runtime, ascii_only=True)
    assert "".join(shown).isascii() and len(accounts) == len(CAST)
    assert set("#=+.:|") <= set(shown[4]) and set("#%=x.") <= set(shown[2])


def test_rates_cover_the_time_between_two_samples(runtime: Runtime) -> None:
    (account,) = play(runtime, crowd(1))
    seconds = iter((100.0, 102.0, 104.0))
    taker = sampler(runtime, clock=lambda: next(seconds))
    assert taker.sample().devices[0].rates == (0.0, 0.0), "there is no earlier sample"
    put(runtime, 0, account.slot, leases=11, reclaims=3)
    (device,) = taker.sample().devices
    assert device.rates == device.ranks[0].rates == (5.0, 1.5)
    put(runtime, 0, account.slot, leases=4)
    assert taker.sample().devices[0].rates.leases == 0.0, "a count that falls is that of a new rank"


def test_a_history_keeps_the_peak_of_each_bucket_for_minutes() -> None:
    history = PeakHistory()
    assert history.add(0.0, 5) == (5,) and history.add(1.0, 3) == (5,)
    assert history.add(BUCKET_SECONDS, 2) == (5, 2)
    assert history.add(4 * BUCKET_SECONDS, 9) == (5, 2, 2, 2, 9), "empty buckets repeat the one before"
    assert history.add(1e6, 1) == (*[9] * (BUCKETS - 1), 1)
