"""kvtop's terminal application: keys, prompts and refresh. `screen` makes the lines that it shows."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, Static

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.tools.control import set_limit, wait_until_holds
from kvcached_core.ledger.tools.trim import ask_to_trim, wait_until_trimmed
from kvcached_core.units import parse_size
from kvctl.exit_codes import CommandError
from kvctl.kvtop.sampling import RankKey, Sampler
from kvctl.kvtop.screen import ORDERS, ViewState, rank_keys
from kvctl.kvtop.widgets import KEYS, HelpScreen, SampleView

_WAIT_SECONDS = 5.0
_READONLY = "disabled: kvtop was started with --readonly"


class Prompt(NamedTuple):
    """A question at the bottom line; `done` gets the answer."""

    label: str
    done: Callable[[str], None]


class TopApp(App[None]):
    """Shows samples of the ledgers. Only the keys `l` and `t` write to them, in another thread."""

    AUTO_FOCUS = None
    ENABLE_COMMAND_PALETTE = False
    TITLE = "kvtop"
    CSS = """
    Screen { background: ansi_default; }
    #status { height: 1; }
    #prompt { height: 1; border: none; padding: 0; display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit"),
        Binding("ctrl+c", "leave"),
        Binding("h,question_mark,f1", "help"),
        Binding("up,k", "move(-1)"),
        Binding("down,j", "move(1)"),
        Binding("pageup", "move(-10)"),
        Binding("pagedown", "move(10)"),
        Binding("home", "move(-10000)"),
        Binding("end", "move(10000)"),
        Binding("space", "mark"),
        Binding("s", "order"),
        Binding("S", "reverse"),
        Binding("slash", "filter"),
        Binding("l", "limit"),
        Binding("t", "trim"),
        Binding("escape", "clear"),
    ]

    def __init__(self, runtime: Runtime, sampler: Sampler, view: ViewState, readonly: bool = False,
                 color: str = "auto") -> None:  # fmt: skip
        if color == "never":
            os.environ["NO_COLOR"] = "1"
        elif color == "always" or not os.environ.get("NO_COLOR"):
            os.environ.pop("NO_COLOR", None)  # an empty value means not set
        super().__init__(ansi_color=True)
        self.animation_level = "none"
        self.view = view
        self._runtime, self._sampler = runtime, sampler
        self._readonly = readonly
        self._devices = SampleView(view)
        self._status = Static(id="status")
        self._input = Input(id="prompt", select_on_focus=False)
        self._prompt: Prompt | None = None
        self.ended_by: int | None = None  # the number of the signal

    def compose(self) -> ComposeResult:
        """Yield the devices, the status line and the input line."""
        with Vertical():
            yield self._devices
            yield self._status
            yield self._input

    def on_mount(self) -> None:
        """Start to refresh. A signal ends kvtop as `q` does, so the terminal is left as it was."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._end, number)
        self.say("")
        self.refresh_sample()
        self.set_interval(self.view.refresh_seconds, self.refresh_sample)

    def _end(self, number: int) -> None:
        self.ended_by = number
        self.exit()

    def say(self, text: str, style: str = "dim") -> None:
        """Show a message at the bottom; an empty message shows the keys."""
        text = text or (KEYS.replace("l limit  t trim  ", "") if self._readonly else KEYS)
        self._status.update(Text(text.replace("\n", " "), style, no_wrap=True, overflow="ellipsis"))

    def refresh_sample(self) -> None:
        """Sample the ledgers and show the sample. An error is shown, and the next refresh tries again."""
        try:
            self._devices.sample = self._sampler.sample()
        except (KVCachedError, CommandError) as error:
            self.say(str(error), "bold red")
        self._show()

    def _show(self) -> None:
        keys = self._keys()
        if self.view.selected not in keys:
            self.view.selected = keys[0] if keys else None
        self.view.marked.intersection_update(keys)
        self._devices.draw()

    def _keys(self) -> list[RankKey]:
        sample = self._devices.sample
        return [] if sample is None else rank_keys(sample, self.view)

    # -- keys --------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """Return whether a key may act: none while a prompt is open, even before its line has the focus."""
        return self._prompt is None or action == "leave"

    def action_leave(self) -> None:
        """Leave kvtop, even while a prompt is open."""
        self.exit()

    def action_help(self) -> None:
        """Show the help."""
        self.push_screen(HelpScreen())

    def action_move(self, by: int) -> None:
        """Select the rank `by` places further down."""
        keys = self._keys()
        if keys and self.view.selected in keys:
            at = keys.index(self.view.selected) + by
            self.view.selected = keys[max(0, min(len(keys) - 1, at))]
        self._show()

    def action_mark(self) -> None:
        """Mark or unmark the selected rank, then select the next."""
        if self.view.selected is not None:
            self.view.marked ^= {self.view.selected}
            self.action_move(1)

    def action_order(self) -> None:
        """Sort by the next order."""
        self.view.order = ORDERS[(ORDERS.index(self.view.order) + 1) % len(ORDERS)]
        self._show()

    def action_reverse(self) -> None:
        """Reverse the order."""
        self.view.reverse = not self.view.reverse
        self._show()

    def action_clear(self) -> None:
        """Clear the filter and the marks."""
        self.view.filter = ""
        self.view.marked.clear()
        self._show()

    def action_filter(self) -> None:
        """Ask for a filter."""
        self._ask(Prompt("filter: ", self._set_filter), self.view.filter)

    def _set_filter(self, text: str) -> None:
        self.view.filter = text.strip()
        self._show()

    def action_limit(self) -> None:
        """Ask for the limit of the marked engines, or of the selected engine."""
        if names := self._chosen_names():
            label = f"limit of {', '.join(names)} (such as 2G, 512M or 50%): "
            self._ask(Prompt(label, lambda text: self._set_limit(names, text)))

    def _set_limit(self, names: list[str], text: str) -> None:
        try:
            size = parse_size(text)
        except ValueError as error:
            self.say(f"{text!r}: {error}", "bold red")
            return

        def change(name: str) -> str:
            outcomes = wait_until_holds(self._runtime, set_limit(self._runtime, name, size), _WAIT_SECONDS)
            holds = all(outcome.holds for outcome in outcomes)
            return f"{name}: limit {size} {'holds' if holds else 'is set; the engine goes on shrinking'}"

        self._change(names, change)

    def action_trim(self) -> None:
        """Ask the marked engines, or the selected engine, to give back memory that no request needs."""

        def change(name: str) -> str:
            trims = ask_to_trim(self._runtime, name)
            outcomes = wait_until_trimmed(self._runtime, name, trims, _WAIT_SECONDS)
            holds = all(outcome.holds for outcome in outcomes)
            return f"{name}: {'trimmed' if holds else 'has not given back all of it yet'}"

        if names := self._chosen_names():
            self.say(f"trimming {', '.join(names)}")
            self._change(names, change)

    def _chosen_names(self) -> list[str]:
        """Return the engines to act on. With --readonly say so and return none."""
        sample, view = self._devices.sample, self.view
        if self._readonly:
            self.say(_READONLY, "yellow")
            return []
        chosen: set[RankKey | None] = {*view.marked} or {view.selected}
        found = [] if sample is None else [
            rank.owner.name for device in sample.devices for rank in device.ranks if rank.key in chosen
        ]  # fmt: skip
        return sorted(set(found))

    def _change(self, names: list[str], change: Callable[[str], str]) -> None:
        """Change the engines in another thread, which may wait for locks and for engines."""

        def work() -> None:
            results, style = [], "green"
            for name in names:
                try:
                    results.append(change(name))
                except KVCachedError as error:
                    results.append(str(error))
                    style = "bold red"
            self.call_from_thread(self.say, "; ".join(results), style)
            self.call_from_thread(self.refresh_sample)

        self.run_worker(work, thread=True)

    # -- prompts -----------------------------------------------------------------------------------------

    def _ask(self, prompt: Prompt, value: str = "") -> None:
        self._prompt = prompt
        self.say(prompt.label, "bold")
        self._input.value = value
        self._input.display = True
        self.screen.set_focus(self._input)  # at once, so that it gets the next key

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Hand the typed line to the prompt."""
        prompt = self._close_prompt()
        if prompt is not None:
            prompt.done(event.value)

    def on_key(self, event: events.Key) -> None:
        """Close the prompt on Escape. Keys that came before the line had the focus are added to the line."""
        if self._prompt is None:
            return
        if event.key == "escape":
            self._close_prompt()
        elif event.key == "enter" and (prompt := self._close_prompt()) is not None:
            prompt.done(self._input.value)
        elif event.is_printable and event.character:
            self._input.insert_text_at_cursor(event.character)
        event.prevent_default()

    def _close_prompt(self) -> Prompt | None:
        prompt, self._prompt = self._prompt, None
        self.say("")
        self._input.display = False
        self.set_focus(None)
        return prompt
