"""Draw the memory that engines held over time, and their throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from devkit.statistics import pairwise

GIB = 2**30
COLOURS = {"stock": "#8c8c8c", "kvcached": "#2f6fb7"}


def held_over_time(result: dict[str, Any], out: Path) -> None:
    """Draw the memory of two engines over time, stacked, with free memory as a line, and the events."""
    samples, notes = result["samples"], result["notes"]
    times, names = samples["time_seconds"], notes.get("engines", {"a": "A", "b": "B"})
    held = [[value / GIB for value in samples[f"{name}_held_bytes"]] for name in names]
    figure = Figure(figsize=(12, 6.5))
    axes = figure.subplots()
    axes.stackplot(times, *held, labels=list(names.values()), colors=["#c0504d", "#4f81bd"], alpha=0.9)
    free = [value / GIB for value in samples.get("free_bytes", [])]
    if free:
        axes.plot(times, free, color="black", linewidth=1.0, label="free")
    top = 1.45 * max(*(sum(pair) for pair in zip(*held, strict=True)), *free)
    begin = notes["events"][0][0] - 5
    turn = begin + 0.6 * (times[-1] - begin)  # labels of later events are written to the left
    for number, (at, text) in enumerate(notes["events"]):
        axes.axvline(at, color="black", linestyle=":", linewidth=0.8)
        right = at > turn
        axes.text(at, top * (0.97 - 0.045 * (number % 6)), f" {text} ", fontsize=8,
                  ha="right" if right else "left")  # fmt: skip
    axes.set(xlim=(begin, times[-1]), ylim=(0, top), xlabel="seconds", ylabel="KV memory held, GiB")
    axes.set_title(f"{notes.get('title', 'Two 8B-shaped vLLM engines')} on one {result['device']['name']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=3, frameon=False)
    _save(figure, out)


def throughput(result: dict[str, Any], out: Path) -> None:
    """Draw the rate of every round of every phase, for stock and kvcached."""
    phases = list(result["ratios"])
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    for place, phase in enumerate(phases):
        for shift, backend in ((-0.15, "stock"), (0.15, "kvcached")):
            values = result["samples"][f"{phase}_tokens_per_second_{backend}"]
            axes.scatter([place + shift] * len(values), values, color=COLOURS[backend], alpha=0.7,
                         label=backend if not place else None)  # fmt: skip
        axes.text(place, 0.02, f"ratio of medians {result['ratios'][phase]['value']:.3f}", ha="center",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xticks(range(len(phases)), phases)
    axes.set_ylabel("generated tokens a second, one dot a round (not from 0)")
    low, high = axes.get_ylim()
    axes.set(xlim=(-0.5, len(phases) - 0.5), ylim=(low - 0.2 * (high - low), high))
    axes.set_title(
        f"vLLM {result['versions'].get('vllm', '')}, shape of Llama-8B, {result['device']['name']}"
    )
    axes.legend(loc="upper center")
    _save(figure, out)


def alternating(result: dict[str, Any], out: Path) -> None:
    """Draw the ratio of kvcached's rate to stock's in every round, with mean and standard error."""
    phases, samples = list(result["ratios"]), result["samples"]
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    axes.axhline(1.0, color=COLOURS["stock"], linewidth=1)
    for place, phase in enumerate(phases):
        mine, stock = (samples[f"{phase}_tokens_per_second_{name}"] for name in ("kvcached", "stock"))
        rounds = pairwise(mine, stock)
        axes.scatter([place] * len(rounds.ratios), rounds.ratios, color=COLOURS["kvcached"], alpha=0.5)
        axes.errorbar(place + 0.15, rounds.mean, rounds.error, fmt="_", color="black", capsize=4)
        axes.text(place + 0.22, rounds.mean, f"{rounds.mean:.3f} \u00b1 {rounds.error:.3f}", va="center")
    axes.set_xticks(range(len(phases)), phases)
    axes.set(xlim=(-0.5, len(phases) - 0.1), ylabel="throughput of kvcached over stock's, one dot a round")
    engine = next(name for name in ("sglang", "vllm") if name in result["versions"])
    named = {"sglang": "SGLang", "vllm": "vLLM"}[engine]
    axes.set_title(f"{named} {result['versions'][engine]}, Llama-8B's shape, {result['device']['name']}")
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(str(out))


PICTURES = {
    "beside": held_over_time,
    "vllm_throughput": throughput,
    "sglang_throughput": throughput,
    "vllm_alternating": alternating,
    "vllm_alternating_h200": alternating,
    "sglang_alternating": alternating,
    "sglang_alternating_layer": alternating,
}
