"""What the run amounts to: numbers, a table, and whether it was as it should be."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from examples.demo.load import Outcome
from kvcached_core.units import format_size

PERCENTS = (50, 90, 99)


class Held(NamedTuple):
    """Bytes of KV memory at the moments that matter; `lowered_limit` is what the limit was lowered to."""

    start: int
    peak: int
    idle: int
    before_limit: int
    after_limit: int
    lowered_limit: int
    peak_after_lift: int
    end: int


class Verdict(NamedTuple):
    """Something that should be so, and whether it is."""

    text: str
    holds: bool


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the least value with at least `percent` % of all at or below it."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99, or nothing of nothing."""
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTS} if values else {}


def verdicts(outcomes: Sequence[Outcome], held: Held) -> list[Verdict]:
    """Judge a run."""
    failures = sum(bool(outcome.error) for outcome in outcomes)
    return [
        Verdict("all requests succeeded", bool(outcomes) and not failures),
        Verdict("memory grew with the load", held.peak > held.start),
        Verdict("memory went down when idle", held.idle < held.peak),
        Verdict(
            "memory went down below the lowered limit",
            held.after_limit <= held.lowered_limit < held.before_limit,
        ),
        Verdict("memory grew again when the limit was lifted", held.peak_after_lift > held.lowered_limit),
        Verdict("memory went down at the end", held.end < held.peak_after_lift),
    ]


def summarise(outcomes: Sequence[Outcome], held: Held, wall_seconds: float) -> dict[str, Any]:
    """Return the run as plain data: counts, seconds and bytes."""
    good = [outcome for outcome in outcomes if not outcome.error]
    return {
        "schema": 1,
        "requests": len(outcomes),
        "failures": len(outcomes) - len(good),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error}),
        "output_tokens": sum(outcome.tokens for outcome in good),
        "ttft_seconds": percentiles([outcome.ttft_seconds for outcome in good]),
        "tpot_seconds": percentiles([outcome.tpot_seconds for outcome in good if outcome.tokens > 1]),
        "held_bytes": held._asdict(),
        "verdicts": {verdict.text: verdict.holds for verdict in verdicts(outcomes, held)},
        "wall_seconds": wall_seconds,
    }


def write(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary as JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(part, path)


def table(summary: dict[str, Any]) -> Table:
    """Return the summary for a terminal."""
    made = Table(title="Elastic KV cache under load", title_justify="left")
    made.add_column("what")
    made.add_column("value", justify="right")
    made.add_row("requests", str(summary["requests"]))
    made.add_row("failures", str(summary["failures"]))
    for name, label in (("ttft_seconds", "time to first token"), ("tpot_seconds", "time per output token")):
        for percent, seconds in summary[name].items():
            made.add_row(f"{label}, {percent}", f"{seconds * 1000:,.0f} ms")
    made.add_section()
    for name, size in summary["held_bytes"].items():
        made.add_row(name.replace("_", " "), format_size(size))
    made.add_section()
    for text, holds in summary["verdicts"].items():
        made.add_row(text, "[green]yes[/]" if holds else "[red]NO[/]")
    made.add_row("wall time", f"{summary['wall_seconds']:.0f} s")
    return made
