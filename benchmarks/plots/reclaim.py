"""Draw the results of benchmarks.sharing.one_gpu and benchmarks.sharing.reclaim, each as a PNG beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {"a": "#c0504d", "b": "#4f81bd", "c": "#9bbb59", "d": "#8064a2"}
KIND_COLOURS = {"idle": "#2f6fb7", "busy": "#d98c3f"}
STAGES = {  # stages of a round: sample -> label
    "asked": "giver\nasked",
    "planned": "giver has\ndecided",
    "first_free": "first bytes\nfree",
    "all_free": "10 GiB\nfree",
    "first_gib": "1 GiB\nusable",
    "all_ready": "10 GiB\nusable",
}


def sharing(result: dict[str, Any], figure: Figure) -> None:
    """Draw the memory of the engines over time, stacked, with the part that requests used, and the events."""
    samples, unit = result["samples"], result["notes"]["unit_bytes"]
    times = samples["time_seconds"]
    upper, axes = figure.subplots(2, height_ratios=(1.2, 2), sharex=True)
    held = [[value / unit for value in samples[f"{name}_held_bytes"]] for name in COLOURS]
    axes.stackplot(
        times, *held, labels=[name.upper() for name in COLOURS], colors=COLOURS.values(), alpha=0.75
    )
    base = [0.0] * len(times)
    for name, each in zip(COLOURS, held, strict=True):
        used = [b + value / unit for b, value in zip(base, samples[f"{name}_used_bytes"], strict=True)]
        axes.fill_between(times, base, used, color="black", alpha=0.25, linewidth=0,
                          label="used by requests" if name == "a" else None)  # fmt: skip
        base = [b + value for b, value in zip(base, each, strict=True)]
    axes.set(xlabel="seconds", ylabel=f"KV memory held, {_unit(unit)}", xlim=(0, times[-1]), ylim=(0, None))
    axes.legend(loc="upper left", ncols=5)
    events = [(at, text) for at, text in result["notes"]["events"] if at <= times[-1]]
    for number, (at, text) in enumerate(events):
        upper.axvline(at, color="black", linestyle=":", linewidth=0.6)
        axes.axvline(at, color="black", linestyle=":", linewidth=0.6)
        right = at > 0.55 * times[-1]
        upper.text(at, 1 - (number + 0.5) / len(events), f" {text} ", fontsize=6.5, va="center",
                   ha="right" if right else "left", transform=upper.get_xaxis_transform())  # fmt: skip
    upper.set_yticks([])
    upper.set_title(f"Engines of the shape of Llama-8B that share one {result['device']['name']}")


def reclaim(result: dict[str, Any], figure: Figure) -> None:
    """Draw the course of the median round, and the stages of all rounds against the goals."""
    samples, goals = result["samples"], result["notes"]["goals_milliseconds"]
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    kinds = [kind for kind in KIND_COLOURS if f"{kind}_all_ready_seconds" in samples]
    for kind in kinds:
        times = [1000 * at for at in samples[f"{kind}_trace_seconds"]]
        for owner, style in (("giver", "--"), ("taker", "-")):
            values = [
                value / result["notes"]["unit_bytes"] for value in samples[f"{kind}_trace_{owner}_bytes"]
            ]
            left.step(
                times, values, style, where="post", color=KIND_COLOURS[kind], label=f"{owner}, giver {kind}"
            )
    left.set(xlabel="milliseconds from the wish", ylabel=f"ready, {_unit(result['notes']['unit_bytes'])}",
             title="The median round", ylim=(0, None))  # fmt: skip
    left.legend(fontsize=8)
    for place, stage in enumerate(STAGES):
        for shift, kind in ((-0.17, "idle"), (0.17, "busy")):
            values = [1000 * value for value in samples.get(f"{kind}_{stage}_seconds", [])]
            right.scatter([place + shift] * len(values), values, s=14, alpha=0.6, color=KIND_COLOURS[kind],
                          label=None if place else f"giver {kind}")  # fmt: skip
        if stage in goals:
            right.hlines(goals[stage], place - 0.4, place + 0.4, color="black", linestyle="--",
                         label="goal" if stage == "all_free" else None)  # fmt: skip
    right.set_xticks(range(len(STAGES)), STAGES.values(), fontsize=8)
    right.set(ylabel="milliseconds from the wish, a dot a round", ylim=(0, None))
    right.set_title(f"10 GiB of cached memory change hands, {result['device']['name']}")
    right.legend()


def _unit(unit_bytes: int) -> str:
    return "GiB" if unit_bytes == 2**30 else f"units of {unit_bytes / 2**20:g} MiB"


def draw_file(path: Path) -> None:
    """Write a PNG beside a result, whose name selects the picture. Raises KeyError if a sample is missing."""
    draw, size = {"sharing": (sharing, (14, 8)), "reclaim": (reclaim, (13, 5.5))}[path.stem.partition("-")[0]]
    figure = Figure(figsize=size, layout="constrained")
    draw(json.loads(path.read_text()), figure)
    FigureCanvasAgg(figure).print_png(str(path.with_suffix(".png")))
