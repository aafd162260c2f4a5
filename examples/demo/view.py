"""Show the engines' memory over time: live bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.demo.memory import Bytes, Sample
from kvcached_core.units import format_size

BAR_CELLS = 44
LINE_SECONDS = 3.0
# one colour for each kind of memory and for each engine; the picture uses the same colours
COLOURS = {"used": "#c0504d", "cached": "#4f81bd", "spare": "#9bbb59"}
ENGINE_COLOURS = ("#d98c3f", "#7f5fa8")
SHADES = "█▓░"  # of a bar's parts, for terminals without colours


class View:
    """Prints events and samples. Samples are shown within `with view.live():`; `say` works at any time."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(highlight=False)
        self._clock = clock
        self._begun = clock()
        self._printed = -LINE_SECONDS
        self._live: Live | None = None

    def say(self, text: str) -> None:
        """Print one line of progress."""
        stamp = f"[{self._clock() - self._begun:5.1f} s] "
        self.console.print(Text.assemble((stamp, "dim"), text), soft_wrap=True)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show samples in place while the block runs, if the output is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=8, transient=True) as self._live:
            yield
        self._live = None

    def show(self, sample: Sample) -> None:
        """Show a sample: every one in a terminal, otherwise a line every few seconds."""
        if self._live is not None:
            self._live.update(bars(sample))
        elif sample.at_seconds - self._printed >= LINE_SECONDS:
            self._printed = sample.at_seconds
            self.say(line(sample))


def line(sample: Sample) -> str:
    """Return a sample as one line of text."""
    parts = []
    for name, engine in sample.engines.items():
        shown = " ".join(f"{kind} {format_size(getattr(engine, kind))}" for kind in COLOURS)
        parts.append(f"{name} {format_size(engine.held)} ({shown})")
    return f"held {format_size(sample.held)} of {format_size(sample.budget)}: {', '.join(parts)}"


def bars(sample: Sample) -> RenderableType:
    """Return a bar for each engine and one for the whole budget, all on one scale."""
    scale = max(sample.budget, sample.held, 1)
    table = Table.grid(padding=(0, 1))
    for name, engine in sample.engines.items():
        table.add_row(name, _engine_bar(engine, scale), format_size(engine.held))
    held = [engine.held for engine in sample.engines.values()]
    whole = _bar(held, ENGINE_COLOURS, scale)
    table.add_row("budget", whole, f"{format_size(sample.held)} of {format_size(sample.budget)}")
    return Group(table, _legend(sample))


def _engine_bar(engine: Bytes, scale: int) -> Text:
    """Return an engine's memory by kind, with a line at its limit if that is below the budget."""
    bar = _bar([getattr(engine, kind) for kind in COLOURS], list(COLOURS.values()), scale)
    at = round(BAR_CELLS * engine.limit / scale)
    if at >= BAR_CELLS:
        return bar
    return Text.assemble(bar[:at], ("|", "bold"), bar[at + 1 :])


def _bar(sizes: Sequence[int], colours: Sequence[str], scale: int) -> Text:
    """Return BAR_CELLS cells. An edge is the rounded sum of the parts before it: errors do not add up."""
    bar, total, drawn = Text(), 0, 0
    for size, colour, shade in zip(sizes, colours, SHADES, strict=False):
        total += size
        edge = round(BAR_CELLS * total / scale)
        bar.append(shade * (edge - drawn), colour)
        drawn = edge
    return bar.append("·" * (BAR_CELLS - drawn), "dim")


def _legend(sample: Sample) -> Text:
    """Return the legend of the colours."""
    kinds = list(zip(COLOURS, COLOURS.values(), SHADES, strict=True))
    engines = list(zip(sample.engines, ENGINE_COLOURS, SHADES, strict=False))
    parts: list[str | tuple[str, str]] = []
    for name, colour, shade in kinds + engines:
        parts += [(shade * 2, colour), f" {name}  "]
    return Text.assemble(*parts, "| limit")
