"""The parts of kvtop's screen: the picture, and the help."""

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

  up down k j  select a rank         space   mark it, or no more
  PgUp PgDn    ten at a time         /       filter: name, model, engine
  Home End     the first, the last   s S     next order, reverse it
  l            set the limit         t       trim: give back spare, cache
  Esc          forget filter, marks  h ? F1  this help
  q            leave

Limit and trim act on the engines marked, or on the selected one, and
there on all ranks. Bars are on the scale of the device:
  █ used  ▓ cached  ▒ stranded  ░ spare  · free, up to the limit
  ┊ floor  │ limit
States: busy, idle, running (neither said), short (got less than it
asked for), asked (to give back), over limit, waiting and starting,
ended (dead), returning (its ledger was lost).

Any key closes this."""


class SampleView(Widget):
    """The picture, as high as there is room. Only lines that have changed are drawn again."""

    DEFAULT_CSS = "SampleView { height: 1fr; }"

    def __init__(self, view: ViewState) -> None:
        super().__init__()
        self._view = view
        self._lines: list[Text] = []
        self.picture: Sample | None = None

    def draw(self) -> None:
        """Draw what is different now."""
        if self.picture is None:
            return
        before, self._lines = (
            self._lines,
            screen_lines(self.picture, self._view, self.size.width, self.size.height),
        )
        most = max(len(before), len(self._lines))
        changed = [y for y in range(most) if before[y : y + 1] != self._lines[y : y + 1]]
        if changed:
            self.refresh(*(Region(0, y, self.size.width, 1) for y in changed))

    def on_resize(self) -> None:
        """Draw anew."""
        self.draw()

    def render_line(self, y: int) -> Strip:
        """Return one line."""
        if y >= len(self._lines):
            return Strip.blank(self.size.width)
        segments = self._lines[y].render(self.app.console)
        return Strip(segments).adjust_cell_length(self.size.width)


class HelpScreen(ModalScreen[None]):
    """The keys and what the bars mean."""

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen > Static { width: auto; height: auto; max-width: 100%; max-height: 100%; border: solid gray; }
    """

    def compose(self) -> ComposeResult:
        """Make the text."""
        yield Static(Text(HELP))

    def on_key(self, event: events.Key) -> None:
        """Close on any key."""
        event.stop()
        self.dismiss()
