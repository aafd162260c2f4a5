"""The parts of kvtop's screen: the devices with their engines, and the help."""

from __future__ import annotations

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.geometry import Region
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from kvctl.kvtop.sampling import Sample
from kvctl.kvtop.screen import ViewState, screen_lines

KEYS = "h help  l limit  t trim  space mark  / filter  s order  q leave"
HELP = """\
kvtop: the KV memory of all devices, live

  up down k j  select a rank         space   mark or unmark the rank
  PgUp PgDn    move by ten ranks     /       filter: name, model, engine
  Home End     first, last rank      s S     next order, reverse order
  l            set the limit         t       trim: free spare and cache
  Esc          clear filter, marks   h ? F1  this help
  q            leave

Limit and trim act on all ranks of the marked engines, or of the
selected engine if none is marked. A full bar is the whole device:
  █ used  ▓ cached  ▒ stranded  ░ spare  · free, up to the limit
  ┊ floor  │ limit
States: busy, idle, running (busy or idle is unknown), short (got less
than it asked for), asked (to give memory back), over limit, waiting
(to start), starting, ended (dead), returning (its ledger was lost).

Any key closes this help."""


class SampleView(Widget):
    """Devices and engines, as high as the terminal allows. Only changed lines are drawn again."""

    DEFAULT_CSS = "SampleView { height: 1fr; }"

    def __init__(self, view: ViewState) -> None:
        super().__init__()
        self._view = view
        self._lines: list[Text] = []
        self.sample: Sample | None = None

    def draw(self) -> None:
        """Draw the lines that have changed."""
        if self.sample is None:
            return
        before, self._lines = (
            self._lines,
            screen_lines(self.sample, self._view, self.size.width, self.size.height),
        )
        most = max(len(before), len(self._lines))
        changed = [y for y in range(most) if before[y : y + 1] != self._lines[y : y + 1]]
        if changed:
            self.refresh(*(Region(0, y, self.size.width, 1) for y in changed))

    def on_resize(self) -> None:
        """Draw again at the new size."""
        self.draw()

    def render_line(self, y: int) -> Strip:
        """Return line `y` of the widget."""
        if y >= len(self._lines):
            return Strip.blank(self.size.width)
        segments = self._lines[y].render(self.app.console)
        return Strip(segments).adjust_cell_length(self.size.width)


class HelpScreen(ModalScreen[None]):
    """Explains keys, bars and states."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen > Static { width: auto; height: auto; max-width: 100%; max-height: 100%; border: solid gray; }
    """

    def compose(self) -> ComposeResult:
        """Yield the text."""
        yield Static(Text(HELP))

    def on_key(self, event: events.Key) -> None:
        """Close on any key."""
        event.stop()
        self.dismiss()
