"""The memory of the engine as it moves: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.demo.memory import Sample
from kvcached_core.units import format_size

BAR_CELLS = 60
LINE_SECONDS = 3.0
# one colour for each kind of byte, the same in the picture
COLOURS = {"used": "#c0504d", "cached": "#4f81bd", "spare": "#9bbb59"}


class View:
    """Says what happens. Use it as `with view.live():` while samples come; `say` works at any time."""

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
        """Show samples in place for as long as this lasts, where the output is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=8, transient=True) as self._live:
            yield
        self._live = None

    def show(self, sample: Sample) -> None:
        """Show a sample: at once in a terminal, else a line every few seconds."""
        if self._live is not None:
            self._live.update(picture(sample))
        elif sample.at_seconds - self._printed >= LINE_SECONDS:
            self._printed = sample.at_seconds
            self.say(line(sample))


def line(sample: Sample) -> str:
    """Return a sample as one line of text."""
    parts = ((name, getattr(sample, name)) for name in ("held", "used", "cached", "spare", "limit"))
    return "  ".join(f"{name} {format_size(size):>10}" for name, size in parts)


def picture(sample: Sample) -> RenderableType:
    """Return a sample as a bar up to the limit, and its numbers."""
    bar = Text()
    scale = max(sample.limit, sample.held, 1)
    for name, colour in COLOURS.items():
        bar.append("█" * round(BAR_CELLS * getattr(sample, name) / scale), colour)
    bar.append("·" * max(0, BAR_CELLS - len(bar)), "dim")
    table = Table.grid(padding=(0, 2))
    for name, colour in COLOURS.items():
        table.add_row(Text(name, colour), Text(format_size(getattr(sample, name)), justify="right"))
    table.add_row("held", format_size(sample.held))
    table.add_row("limit", format_size(sample.limit))
    return Group(Text("KV memory of the engine", "bold"), bar, table)
