"""Draw a run of the demo: bytes over time, with its events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo.memory import Mark, Sample
from examples.demo.view import COLOURS, ENGINE_COLOURS
from kvcached_core.units import MIB

LABELS = {
    "used": "used by requests",
    "cached": "kept by the prefix cache",
    "spare": "spare: ready, or on its way back",
}
ROWS, ROW_HEIGHT = 6, 0.11  # rows for the events' texts; height of a row as a share of the budget
LETTER_WIDTH = 0.0057  # as a share of the width of the picture


def draw(path: Path, samples: Sequence[Sample], marks: Sequence[Mark], title: str) -> None:
    """Write a PNG: a panel for the budget and one for each engine; bytes over time, events marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(samples[0].engines)
    panels = len(names) + 1
    figure, all_axes = pyplot.subplots(
        panels, 1, figsize=(12, 8.6), dpi=110, sharex=True, layout="constrained"
    )
    times = [s.at_seconds for s in samples]
    _draw_whole(all_axes[0], times, samples)
    for axes, name in zip(all_axes[1:], names, strict=True):
        _draw_engine(axes, times, samples, name)
    top = max(max(s.held, s.budget) for s in samples) / MIB
    for axes in all_axes:
        axes.set_ylim(0, top * 1.06)
        axes.set_xlim(times[0], times[-1])
        axes.grid(axis="y", alpha=0.3)
        for mark in marks:
            axes.axvline(mark.at_seconds, color="grey", linestyle=":", linewidth=1)
    all_axes[0].set_ylim(0, top * (1.06 + ROW_HEIGHT * ROWS))
    _write_marks(all_axes[0], marks, top)
    all_axes[-1].set_xlabel("time since both servers were ready, in seconds")
    figure.suptitle(title)
    labelled = {
        label: handle
        for axes in all_axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_whole(axes: Any, times: Sequence[float], samples: Sequence[Sample]) -> None:
    """Draw the memory of both engines, stacked, below the budget."""
    names = list(samples[0].engines)
    layers = [[s.engines[name].held / MIB for s in samples] for name in names]
    axes.stackplot(times, layers, labels=names, colors=ENGINE_COLOURS)
    axes.plot(times, [s.budget / MIB for s in samples], color="black", linewidth=1.6, label="budget")
    axes.set_ylabel("together, in MiB")


def _draw_engine(axes: Any, times: Sequence[float], samples: Sequence[Sample], name: str) -> None:
    """Draw the memory of one engine by kind, and its limit."""
    seen = [s.engines[name] for s in samples]
    layers = [[getattr(each, kind) / MIB for each in seen] for kind in COLOURS]
    axes.stackplot(times, layers, labels=[LABELS[kind] for kind in COLOURS], colors=list(COLOURS.values()))
    limits = [each.limit / MIB for each in seen]
    axes.step(times, limits, where="post", color="black", linestyle="--", linewidth=1.3, label="limit")
    axes.set_ylabel(f"{name}, in MiB")


def _write_marks(axes: Any, marks: Sequence[Mark], top: float) -> None:
    """Write the text of each event above all curves, in rows so that neighbours stay apart."""
    first, last = axes.get_xlim()
    ends = [first] * ROWS  # time from which each row is free
    for mark in marks:
        width = LETTER_WIDTH * len(mark.text) * (last - first)
        # a text that would reach beyond the end is written to the left of its line
        late = mark.at_seconds + width > last
        begin = mark.at_seconds - width if late else mark.at_seconds
        row = next((row for row in range(ROWS) if ends[row] <= begin), ends.index(min(ends)))
        ends[row] = begin + width
        side, shift = ("right", -3) if late else ("left", 3)
        axes.annotate(
            mark.text, (mark.at_seconds, top * (1.06 + ROW_HEIGHT * (ROWS - row))), xytext=(shift, -9),
            textcoords="offset points", fontsize=8, horizontalalignment=side,
        )  # fmt: skip
