"""Draw the results of ledger_simulation and prefix."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from devkit.statistics import percentile

SHOWN = ("bursts_4", "weighted_4", "floors_4")  # scenes in which the memory of every owner is drawn
SCENES = ("bursts_2", "bursts_4", "bursts_8", "bursts_16", "weighted_4", "floors_4", "steady_4")
_TITLES = {
    "bursts_4": "four equal owners with bursts",
    "weighted_4": "weights 100, 200, 400, 100",
    "floors_4": "the last has a floor of 256",
}


def simulation(result: Mapping[str, Any], out: Path) -> None:
    """Draw the memory of owners against their ideal shares, and the distributions of the samples."""
    samples = result["samples"]
    figure = Figure(figsize=(19, 10), layout="constrained")
    grid = figure.subplots(4, len(SHOWN) + 1, sharey=False, width_ratios=[1.2] * len(SHOWN) + [1])
    for column, scene in enumerate(SHOWN):
        for owner in range(4):
            _owner(grid[owner][column], samples, scene, owner, result["notes"]["capacity_granules"])
        grid[0][column].set_title(_TITLES[scene])
        grid[3][column].set_xlabel("simulated seconds")
    summaries = [row[-1] for row in grid]
    _distribution(
        summaries[0], samples, "deviation_percent", "missing of the ideal after 1 s, % of the device"
    )
    _distribution(summaries[1], samples, "share_reclaim_seconds", "seconds from a refused lease to the share")
    _distribution(summaries[2], samples, "floor_reclaim_seconds", "seconds from a refused lease to the floor")
    summaries[2].axvline(1.0, color="black", linestyle=":", linewidth=1)
    _costs(summaries[3], samples)
    FigureCanvasAgg(figure).print_png(str(out))


def _owner(axes: Any, samples: Mapping[str, Sequence[float]], scene: str, owner: int, capacity: int) -> None:
    times = samples[f"{scene}.drawn_seconds"]
    axes.fill_between(times, samples[f"{scene}.owner_{owner}_held_granules"], color="#9dc3e6", label="held")
    axes.plot(
        times, samples[f"{scene}.owner_{owner}_ideal_granules"], color="black", linewidth=1, label="ideal"
    )
    axes.set(ylim=(0, 1.05 * capacity), xlim=(0, times[-1]), ylabel=f"owner {owner}, granules")
    axes.grid(alpha=0.3)
    if owner == 0:
        axes.legend(loc="upper right", fontsize=8)


def _distribution(axes: Any, samples: Mapping[str, Sequence[float]], what: str, label: str) -> None:
    for at, scene in enumerate(SCENES):
        values = sorted(samples.get(f"{scene}.{what}", ()))
        if values:
            parts = [100 * (number + 1) / len(values) for number in range(len(values))]
            axes.plot(values, parts, color=f"C{at}", label=scene, drawstyle="steps-post")
    axes.set(xlabel=label, ylabel="% of them", ylim=(0, 101))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def _costs(axes: Any, samples: Mapping[str, Sequence[float]]) -> None:
    for at, kind in enumerate(("free", "contested")):
        names = [re.fullmatch(rf"lease_{kind}_(\d+)_microseconds", name) for name in samples]
        found = sorted((int(match[1]), samples[match[0]]) for match in names if match)
        owners = [number for number, _ in found]
        axes.plot(
            owners, [percentile(values, 50) for _, values in found], marker="o", color=f"C{at}", label=kind
        )
        axes.plot(owners, [percentile(values, 99) for _, values in found], linestyle=":", color=f"C{at}",
                  label=f"{kind}, p99")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(owners, [str(number) for number in owners])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="owners on the device", ylabel="us of a lease")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)


def prefix(result: Mapping[str, Any], out: Path) -> None:
    """Draw hit rates before and after the reclaim: rows are givers, columns are reclaimed shares."""
    samples, notes = result["samples"], result["notes"]
    figure = Figure(figsize=(17, 7.5), layout="constrained")
    cases = sorted({tuple(name.split(".")[:2]) for name in result["ratios"]}, key=lambda case: int(case[1]))
    percents = list(dict.fromkeys(percent for _, percent in cases))
    for giver, row in zip(("idle", "busy"), figure.subplots(2, len(percents), sharey=True), strict=True):
        for percent, axes in zip(percents, row, strict=True):
            case = f"{giver}.{percent}"
            for kind, colour in (("stock", "#8c8c8c"), ("reclaimed", "#2f6fb7")):
                rates = samples[f"{case}.windows.{kind}"]
                requests = [
                    (at - notes["windows_before"]) * notes["window_requests"] for at in range(len(rates))
                ]
                axes.step(requests, rates, where="post", color=colour, label=_PREFIX_LABELS[kind])
            axes.axvspan(0, notes["right_after_requests"], color="#f5e6b8", alpha=0.6)
            first, later = (_value(result["ratios"][f"{case}.{when}"]) for when in ("right_after", "later"))
            axes.set_title(
                f"{giver} giver, {percent} %: {first:.3f} right after, then {later:.3f}", fontsize=9
            )
            axes.set_ylim(0, 1)
            axes.grid(alpha=0.3)
            axes.set_xlabel("requests since the reclaim")
        row[0].set_ylabel("hit rate, tokens of prompts")
    figure.axes[0].legend(loc="lower left", fontsize=8)
    FigureCanvasAgg(figure).print_png(str(out))


_PREFIX_LABELS = {
    "stock": "stock, as small from the beginning",
    "reclaimed": "kvcached, so much reclaimed at 0",
}


def _value(found: Any) -> float:
    """Return the value of a ratio, given as an entry of a result file or as a number."""
    return float(found["value"] if isinstance(found, Mapping) else found)


PICTURES = {"ledger_simulation": simulation, "prefix": prefix}
