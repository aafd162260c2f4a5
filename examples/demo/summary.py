"""Summarise a run: numbers, a table, and the expectations with their verdicts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from devkit.statistics import percentile
from examples.demo.load import Outcome
from kvcached_core.units import format_size

PERCENTS = (50, 90, 99)


class Held(NamedTuple):
    """Bytes of KV memory that one engine held at the moments that the verdicts judge."""

    start: int
    peak: int  # in its burst while the other engine was idle
    peak_used: int  # in that burst, used by requests
    idle: int  # once it was idle after that burst
    least_beside: int  # least, while the other engine had its burst
    before_limit: int  # before and after the limit of one engine was lowered
    after_limit: int
    peak_together: int  # in the bursts on both engines at once, after the limit was lifted
    end: int


class Run(NamedTuple):
    """The run to judge: outcomes of requests, bytes held by each engine, lowered limits, and the budget."""

    outcomes: Sequence[Outcome]
    held: Mapping[str, Held]  # in the order of their bursts
    lowered: Mapping[str, int]
    budget: int


class Verdict(NamedTuple):
    """An expectation, and whether it holds."""

    text: str
    holds: bool


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90 and p99, or an empty dictionary without values."""
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTS} if values else {}


def verdicts(run: Run) -> Iterator[Verdict]:
    """Yield every expectation, and whether it held in this run."""
    good = bool(run.outcomes) and not any(outcome.error for outcome in run.outcomes)
    yield Verdict("all requests succeeded", good)
    for name, held in run.held.items():
        yield Verdict(f"{name} used more than half of the budget", held.peak_used > run.budget / 2)
        yield Verdict(f"{name} went down when idle", held.idle < held.peak)
    giver = next(iter(run.held))
    gave = run.held[giver].least_beside < run.held[giver].idle
    yield Verdict(f"{giver} gave its cache back to the other", gave)
    for name, limit in run.lowered.items():
        held = run.held[name]
        fell = held.after_limit <= limit < held.before_limit
        yield Verdict(f"{name} went down below its lowered limit", fell)
        yield Verdict(f"{name} grew again when it was lifted", held.peak_together > limit)


def summarise(run: Run, wall_seconds: float) -> dict[str, Any]:
    """Return the run as plain data: counts, seconds and bytes."""
    engines = {
        name: _engine([outcome for outcome in run.outcomes if outcome.engine == name], held)
        for name, held in run.held.items()
    }
    return {
        "schema": 2,
        "budget_bytes": run.budget,
        "lowered_limit_bytes": dict(run.lowered),
        "engines": engines,
        "requests": len(run.outcomes),
        "failures": sum(bool(outcome.error) for outcome in run.outcomes),
        "verdicts": {verdict.text: verdict.holds for verdict in verdicts(run)},
        "wall_seconds": wall_seconds,
    }


def _engine(outcomes: Sequence[Outcome], held: Held) -> dict[str, Any]:
    """Return one engine's part of the summary; times include successful requests only."""
    good = [outcome for outcome in outcomes if not outcome.error]
    return {
        "requests": len(outcomes),
        "failures": len(outcomes) - len(good),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error}),
        "output_tokens": sum(outcome.tokens for outcome in good),
        "ttft_seconds": percentiles([outcome.ttft_seconds for outcome in good]),
        "tpot_seconds": percentiles([outcome.tpot_seconds for outcome in good if outcome.tokens > 1]),
        "held_bytes": held._asdict(),
    }


def write(path: Path, summary: dict[str, Any]) -> None:
    """Write the summary as JSON; the file appears only once it is complete."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(part, path)


def table(summary: dict[str, Any]) -> Table:
    """Return the summary for a terminal: a column for each engine, then the verdicts."""
    engines = summary["engines"]
    made = Table(title=f"Two engines on {format_size(summary['budget_bytes'])}", title_justify="left")
    made.add_column("")
    for name in engines:
        made.add_column(name, justify="right")
    for label, values in _rows(list(engines.values())):
        made.add_row(label, *values)
    made.add_section()
    for text, holds in summary["verdicts"].items():
        made.add_row(text, "[green]yes[/]" if holds else "[red]NO[/]")
    made.add_row("wall time", f"{summary['wall_seconds']:.0f} s")
    return made


def _rows(engines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield a label and a value for each engine."""
    for name in ("requests", "failures"):
        yield name, [str(engine[name]) for engine in engines]
    for name, label in (("ttft_seconds", "time to first token"), ("tpot_seconds", "time per output token")):
        for percent in (f"p{percent}" for percent in PERCENTS):
            yield f"{label}, {percent}", [_milliseconds(engine[name].get(percent)) for engine in engines]
    for name in Held._fields:
        yield name.replace("_", " "), [format_size(engine["held_bytes"][name]) for engine in engines]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:,.0f} ms"
