"""The picture of a run: bytes over time, with what happened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo.memory import Mark, Sample
from examples.demo.view import COLOURS
from kvcached_core.units import MIB

LABELS = {
    "used": "used by requests",
    "cached": "kept by the prefix cache",
    "spare": "spare: ready, or on its way back",
}
ROWS, ROW_HEIGHT = 3, 0.08  # of the texts of events; the height as a share of the highest value


def draw(path: Path, samples: Sequence[Sample], marks: Sequence[Mark], title: str) -> None:
    """Write a PNG: used, cached and spare bytes stacked over time, the limit as a line, events marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 6.2), dpi=130, layout="constrained")
    times = [s.at_seconds for s in samples]
    names = list(COLOURS)
    layers = [[getattr(s, name) / MIB for s in samples] for name in names]
    axes.stackplot(times, layers, labels=[LABELS[n] for n in names], colors=[COLOURS[n] for n in names])
    axes.step(
        times, [s.limit / MIB for s in samples], where="post", color="black", linewidth=1.6, label="limit"
    )
    top = max(max(s.held, s.limit) for s in samples) / MIB
    axes.set_ylim(0, top * (1 + ROW_HEIGHT * (ROWS + 1)))
    axes.set_xlim(times[0], times[-1])
    _draw_marks(axes, marks, top)
    axes.set_xlabel("time since the server was ready, in seconds")
    axes.set_ylabel("KV memory, in MiB")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_marks(axes: Any, marks: Sequence[Mark], top: float) -> None:
    """Draw a line for each event, its text above all curves, in rows so that neighbours stay apart."""
    first, last = axes.get_xlim()
    for i, mark in enumerate(marks):
        axes.axvline(mark.at_seconds, color="grey", linestyle=":", linewidth=1)
        height = top * (1 + ROW_HEIGHT * (1 + i % ROWS))
        # what stands far to the right is written to the left of its line
        late = (mark.at_seconds - first) > 0.85 * (last - first)
        side, shift = ("right", -3) if late else ("left", 3)
        axes.annotate(
            mark.text, (mark.at_seconds, height), xytext=(shift, -6), textcoords="offset points",
            fontsize=8, horizontalalignment=side,
        )  # fmt: skip
