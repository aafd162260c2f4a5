"""Draw the result of benchmarks.sharing.shared_budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvcached_core.units import MIB

COLOURS = {"a": ("#d98c3f", "#f3dcc4"), "b": ("#7f5fa8", "#d9cfe6")}  # (used by requests, held otherwise)
TITLES = {"static": "static split, half of the budget each", "shared": "one shared budget"}
MODE_COLOURS = {"static": "#8c8c8c", "shared": "#2f6fb7"}


def draw_file(path: Path) -> None:
    """Write a PNG beside a result: bytes over time in both modes, and the times to first token."""
    result = json.loads(path.read_text())
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    first = None
    for row, mode in enumerate(TITLES):
        axes = figure.add_subplot(grid[row, :], sharex=first)
        first = first or axes
        _bytes(axes, result, mode)
    for column, (kind, title) in enumerate(
        (("alone", "one engine in a burst, the other idle"), ("together", "both in a burst"))
    ):
        _times(figure.add_subplot(grid[2, column]), result["samples"], kind, title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    name = result["device"]["name"]
    figure.suptitle(f"Two engines on {result['notes']['budget_bytes'] / MIB:.0f} MiB, one trace; {name}")
    FigureCanvasAgg(figure).print_png(str(path.with_suffix(".png")))


def _bytes(axes: Any, result: dict[str, Any], mode: str) -> None:
    """Draw the memory of both engines, stacked; the part that requests use is darker."""
    samples, budget = result["samples"], result["notes"]["budget_bytes"] / MIB
    layers, colours, labels = [], [], []
    for name, (dark, light) in COLOURS.items():
        held, used = (
            [value / MIB for value in samples[f"{name}_{kind}_bytes_{mode}"]] for kind in ("held", "used")
        )
        # two processes write these two ledger fields, so the fields may disagree for a moment
        used = [min(pair) for pair in zip(held, used, strict=True)]
        layers += [used, [h - u for h, u in zip(held, used, strict=True)]]
        colours += [dark, light]
        labels += [f"{name}: used by requests", f"{name}: cached and spare"]
    axes.stackplot(samples[f"time_seconds_{mode}"], layers, colors=colours, labels=labels)
    axes.axhline(budget, color="black", linewidth=1.2)
    axes.set(ylim=(0, budget * 1.05), ylabel="KV memory, MiB", xlabel="seconds", title=TITLES[mode])
    axes.margins(x=0)


def _times(axes: Any, samples: dict[str, list[float]], kind: str, title: str) -> None:
    """Draw the share of requests by time to first token."""
    for mode, colour in MODE_COLOURS.items():
        values = sorted(samples[f"ttft_seconds_{kind}_{mode}"])
        shares = [(rank + 1) / len(values) for rank in range(len(values))]
        axes.step(values, shares, where="post", color=colour, label=TITLES[mode])
    axes.set(xlim=(0, None), ylim=(0, 1.02), xlabel="time to first token, seconds", title=title)
    axes.set_ylabel("share of requests")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
