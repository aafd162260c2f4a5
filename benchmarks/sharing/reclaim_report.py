"""The result of benchmarks.sharing.reclaim: samples, goals, and a table as text."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.record import Ratio, write
from benchmarks.sharing.reclaim_round import STAGES, Round, parts
from devkit.statistics import percentile

GOALS_MILLISECONDS = {"all_free": 100.0, "first_gib": 50.0, "all_ready": 150.0}  # 99th percentile
TRACE_ROWS = 400
RATES = ("control_tokens_per_second", "taking_tokens_per_second",
         "control_longest_pause_seconds", "taking_longest_pause_seconds")  # fmt: skip


def samples_of(rounds: Mapping[str, Sequence[Round]]) -> dict[str, list[float]]:
    """Return every measurement of every round, and the ledger readings of the median round."""
    samples: dict[str, list[float]] = {}
    for kind, played in rounds.items():
        if not played:
            continue
        for stage in STAGES:
            samples[f"{kind}_{stage}_seconds"] = [one.seconds[stage] for one in played]
        samples[f"{kind}_given_bytes"] = [one.seconds["given"] for one in played]
        samples[f"{kind}_giver_cached_bytes"] = [one.seconds["cached"] for one in played]
        samples[f"{kind}_widest_gap_seconds"] = [one.widest_gap_seconds for one in played]
        for name in RATES if kind == "busy" else ():
            samples[f"{kind}_{name}"] = [one.rates[name] for one in played]
        samples |= _trace(kind, sorted(played, key=lambda one: one.seconds["all_ready"])[len(played) // 2])
    return samples


def _trace(kind: str, one: Round) -> dict[str, list[float]]:
    end = one.said_at + 1.2 * one.seconds["all_ready"]
    rows = [row for row in one.rows if row.at <= end]
    rows = rows[:: max(1, len(rows) // TRACE_ROWS)]
    return {
        f"{kind}_trace_seconds": [row.at - one.said_at for row in rows],
        f"{kind}_trace_giver_bytes": [row.giver_ready for row in rows],
        f"{kind}_trace_taker_bytes": [row.taker_ready for row in rows],
    }


def verdicts(samples: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Return a verdict for each goal."""
    said = {}
    for kind in ("idle", "busy"):
        for stage, goal in GOALS_MILLISECONDS.items():
            values = samples.get(f"{kind}_{stage}_seconds")
            if values:
                p99 = 1000 * percentile(values, 99)
                verdict = "met" if p99 <= goal else "missed"
                said[f"{kind} {stage}"] = f"{verdict}: p99 {p99:.1f} ms, goal {goal:.0f} ms"
    return said


def save(path: Path, rounds: Mapping[str, Sequence[Round]], more: Mapping[str, Sequence[float]],
         notes: Mapping[str, Any], started: float) -> None:  # fmt: skip
    """Write the measurements so far."""
    samples = samples_of(rounds) | {name: list(values) for name, values in more.items()}
    ratios = {}
    if rounds["busy"] and min(samples["busy_control_tokens_per_second"]) > 0:
        ratios["busy_throughput"] = Ratio("busy_taking_tokens_per_second", "busy_control_tokens_per_second")
    told = {"goals_milliseconds": GOALS_MILLISECONDS, "goals": verdicts(samples), "parts": _parts(rounds)}
    write(path, sys.argv, samples, ratios, started, dict(notes) | told)


def _parts(rounds: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, float]]:
    """Return the median of every part, in milliseconds."""
    found = {}
    for kind, played in rounds.items():
        each = [parts(one.seconds) for one in played]
        if each:
            found[kind] = {name: 1000 * statistics.median(one[name] for one in each) for name in each[0]}
    return found


def table(rounds: Mapping[str, Sequence[Round]], more: Mapping[str, Sequence[float]]) -> str:
    """Return a table of all times as text: median, 99th percentile and maximum, in milliseconds."""
    samples = samples_of(rounds) | dict(more)
    lines = [f"{'milliseconds':44} {'p50':>8} {'p99':>8} {'max':>8}"]
    for name, values in samples.items():
        if name.endswith("_seconds") and "trace" not in name:
            numbers = (1000 * statistics.median(values), 1000 * percentile(values, 99), 1000 * max(values))
            lines.append(f"{name.removesuffix('_seconds'):44} " + " ".join(f"{n:8.3f}" for n in numbers))
    for kind, of_kind in _parts(rounds).items():
        lines += [
            f"giver {kind}, median: {milliseconds:7.2f} ms  {what}" for what, milliseconds in of_kind.items()
        ]
    for name in RATES[:2]:
        if rates := samples.get(f"busy_{name}"):
            lines.append(f"giver busy, {name}: median {statistics.median(rates):.0f}")
    return "\n".join([*lines, *(f"{what}: {verdict}" for what, verdict in verdicts(samples).items())])
