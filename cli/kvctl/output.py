"""Print data to stdout and messages to stderr. By default only a terminal gets colours."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvcached_core.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

JSON_VERSION = 1
DASH = "-"
_WIDTH_WITHOUT_TERMINAL = 200
STATE_STYLES = {
    "running": "green", "busy": "green", "idle": "cyan", "short": "yellow", "asked": "yellow",
    "over limit": "bold red", "ended": "dim", "holds": "green", "not acknowledged": "yellow",
    "ok": "green", "warning": "yellow", "error": "bold red",
}  # fmt: skip
_color = "auto"


def choose_color(when: str) -> None:
    """Choose when this process prints colours: auto, always or never."""
    global _color
    _color = when


def is_terminal() -> bool:
    """Return whether stdout is a terminal that can show colours and move its cursor."""
    return _is_tty() and os.environ.get("TERM") not in ("dumb", "")


def _is_tty() -> bool:
    with contextlib.suppress(AttributeError, ValueError):  # closed before the process began
        return sys.stdout.isatty()
    return False


def line_width() -> int:
    """Return the length of a line on stdout, in cells."""
    return shutil.get_terminal_size().columns if _is_tty() else _WIDTH_WITHOUT_TERMINAL


def console(width: int | None = None, file: Any = None, interactive: bool | None = None) -> Console:
    """Return a console for stdout, or for `file`, that colours as chosen with `choose_color`."""
    from rich.console import Console

    always = _color == "always"
    return Console(
        file=file, width=width, highlight=False, force_terminal=always or is_terminal(),
        force_interactive=interactive, legacy_windows=False,
        no_color=False if always else True if _color == "never" else None,
        color_system="truecolor" if always else "auto",
    )  # fmt: skip


def render(renderable: RenderableType, width: int | None = None) -> str:
    """Return the text that a console would print."""
    text = io.StringIO()
    console(width or line_width(), text).print(renderable)
    return text.getvalue()


def print_json(data: Mapping[str, Any], indent: int | None = 2) -> None:
    """Print one JSON object. Its layout changes only with its `version`."""
    write(json.dumps({"version": JSON_VERSION, **data}, indent=indent) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. A column whose title begins with `>` is flush right."""
    write(table_text(columns, rows))


def table_text(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """Return a table as text. In a narrow terminal columns move closer together, then are cut."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        side: Literal["right", "left"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=side, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell, STATE_STYLES.get(cell, "")) for cell in row))
    target = console(width or line_width())
    if Measurement.get(target, target.options.update(width=10_000), table).maximum > target.width:
        table.padding = (0, 1, 0, 0)
    return render(table, width)


def write(text: str) -> None:
    """Write data to stdout. Raises BrokenPipeError and OSError, as stdout does."""
    if sys.stdout is not None:  # None: closed before the process began
        sys.stdout.write(encodable(text))


def encodable(text: str) -> str:
    """Return the text with `?` for each character that stdout's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def say(message: str) -> None:
    """Print a message to stderr."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"kvctl: {message}", file=sys.stderr)


def short_size(size_bytes: int) -> str:
    """Return a size for a narrow column, such as 1.53G: three digits and the first letter of the unit."""
    for unit, factor in (("T", 1 << 40), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes >= factor:
            number = size_bytes / factor
            digits = f"{number:.0f}" if number >= 99.95 else f"{number:.3g}"
            return digits + unit
    return str(size_bytes)


def percent(part: int, whole: int) -> str:
    """Return a share, such as 31.4%; a dash if `whole` is 0."""
    return f"{100 * part / whole:.1f}%" if whole else DASH
