"""Compute the stages of a round of benchmarks.sharing.reclaim from readings of ledger fields over time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# The ledger fields of a Row, in its order.
GIVER_WORDS = ("asked_until_ms", "target_bytes", "ordered_granules", "ready_bytes")
TAKER_WORDS = ("ready_bytes",)
STAGES = ("asked", "planned", "first_free", "all_free", "first_gib", "all_ready")


class Row(NamedTuple):
    """Ledger fields of giver and taker at one moment; `free` is the driver's free bytes, if it was asked."""

    at: float  # seconds of the monotonic clock
    asked_until_ms: int
    target: int
    ordered: int
    giver_ready: int
    taker_ready: int
    free: int = 0


class Round(NamedTuple):
    """A round: seconds from the taker's wish to each stage, bytes given, and the giver's token rates."""

    seconds: dict[str, float]
    rates: dict[str, float]
    rows: list[Row]
    said_at: float
    widest_gap_seconds: float  # between two readings


def split(rows: Sequence[Row], said_at: float) -> tuple[Row, list[Row]]:
    """Return the last row before the wish, and all later rows. Raises ValueError if no row is before it."""
    before = [row for row in rows if row.at <= said_at]
    if not before:
        raise ValueError("the words were not read before the wish")
    return before[-1], [row for row in rows if row.at > said_at]


def measure(rows: Sequence[Row], said_at: float, wish_bytes: int, gib: int) -> dict[str, float]:
    """Return the seconds from the wish to each of STAGES, and the bytes that were `given`.

    `all_free` is the time at which the giver has released all bytes of this round: those that it gives until
    the taker has everything. Raises ValueError with the name of a stage that was never seen.
    """
    before, after = split(rows, said_at)

    def first(stage: str, condition: Callable[[Row], bool]) -> Row:
        for row in after:
            if condition(row):
                return row
        had, has = before.taker_ready, rows[-1].taker_ready
        raise ValueError(f"never seen: {stage}; the taker had {had} bytes before the wish and {has} at last")

    def has_more(size_bytes: int) -> Callable[[Row], bool]:
        return lambda row: row.taker_ready - before.taker_ready >= size_bytes

    done = first("all_ready", has_more(wish_bytes))
    least = min(row.giver_ready for row in after if row.at <= done.at)
    at = {
        "asked": first("asked", lambda row: row.asked_until_ms > before.asked_until_ms and row.target > 0),
        "planned": first("planned", lambda row: row.ordered > before.ordered),
        "first_free": first("first_free", lambda row: row.giver_ready < before.giver_ready),
        "all_free": first("all_free", lambda row: row.giver_ready <= least),
        "first_gib": first("first_gib", has_more(gib)),
        "all_ready": done,
    }
    return {stage: at[stage].at - said_at for stage in STAGES} | {"given": before.giver_ready - least}


def driver_error_bytes(rows: Sequence[Row], said_at: float) -> dict[str, int]:
    """Compare the change of the driver's free bytes with the ledger's (given - taken).

    The difference is never far below zero, because memory is freed before the ledger shows it.
    """
    before, after = split(rows, said_at)
    errors = [
        (row.free - before.free)
        - ((before.giver_ready - row.giver_ready) - (row.taker_ready - before.taker_ready))
        for row in after
    ]
    return {"least": min(errors), "most": max(errors), "at_the_end": errors[-1]}


def token_rates(steps: Sequence[Sequence[float]], said_at: float, window_seconds: float) -> dict[str, float]:
    """Return tokens per second, and the longest pause between two steps, before and after the wish.

    `steps` are (seconds of the monotonic clock, tokens).
    """
    rates = {}
    for name, begin in (("control", said_at - window_seconds), ("taking", said_at)):
        within = [(at, tokens) for at, tokens in steps if begin <= at < begin + window_seconds]
        edges = [begin, *(at for at, _ in within), begin + window_seconds]
        rates[f"{name}_tokens_per_second"] = sum(tokens for _, tokens in within) / window_seconds
        rates[f"{name}_longest_pause_seconds"] = max(b - a for a, b in itertools.pairwise(edges))
    return rates


def parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of the time until all memory is usable, in seconds."""
    return {
        "taker wakes, leases and asks": seconds["asked"],
        "giver's scheduler wakes, evicts and decides": seconds["planned"] - seconds["asked"],
        "plan reaches the worker, first slice unmapped and freed": seconds["first_free"] - seconds["planned"],
        "the rest is unmapped and freed": seconds["all_free"] - seconds["first_free"],
        "taker makes the rest of its pages": seconds["all_ready"] - seconds["all_free"],
    }
