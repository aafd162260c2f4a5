"""Bars of bytes: parts one after the other on a scale, with marks; for colours, for none, and for ASCII."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.text import Text

# Every part has a shade of its own as well as a colour: bars say the same in monochrome.
COLOURS = {
    "used": "#d9655b", "cached": "#5b93d9", "spare": "#a3c25f", "other": "#8a8a8a", "stranded": "#c79ad0",
}  # fmt: skip
SHADES = {"used": "█", "cached": "▓", "stranded": "▒", "spare": "░", "other": "▞"}
ASCII = {"used": "#", "cached": "=", "stranded": "%", "spare": "+", "other": "x"}
EMPTY, ASCII_EMPTY = "·", "."
_SPARKS, _ASCII_SPARKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


class BarSegment(NamedTuple):
    """So many bytes of a kind; `shade` if it is not its kind's own."""

    kind: str
    size_bytes: int
    shade: str = ""


class BarMarker(NamedTuple):
    """A line at a number of bytes, drawn as `sign`."""

    at_bytes: int
    sign: str


def can_draw(encoding: str | None = None) -> bool:
    """Say whether the shades can be written to stdout."""
    try:
        "".join((*SHADES.values(), EMPTY, _SPARKS)).encode(encoding or sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError, AttributeError):
        return False
    return True


def bar(parts: Iterable[BarSegment], scale_bytes: int, cells: int, marks: Sequence[BarMarker] = (),
        ascii_only: bool = False, open_bytes: int | None = None) -> Text:  # fmt: skip
    """Return `cells` cells. Each edge is where the sum so far lies, so that no rounding adds up; a part that
    is not nothing has a cell as long as there is one. What is free up to `open_bytes` (default: the scale)
    is dotted. A kind may be a colour itself."""
    shades, dot = (ASCII, ASCII_EMPTY) if ascii_only else (SHADES, EMPTY)
    scale, total = max(scale_bytes, 1), 0
    runs: list[tuple[int, str, str]] = []  # where each ends, its sign and its style
    drawn = 0
    for kind, size_bytes, own_shade in parts:
        total += max(0, size_bytes)
        edge = min(cells, round(cells * total / scale))
        if size_bytes > 0 and edge == drawn:
            edge = min(cells, drawn + 1)
        if edge > drawn:
            runs.append((edge, own_shade or shades[kind], COLOURS.get(kind, kind)))
            drawn = edge
    room = cells if open_bytes is None else min(cells, round(cells * open_bytes / scale))
    runs += [(max(drawn, room), dot, "dim"), (cells, " ", "")]
    at_cell = {min(cells - 1, round(cells * mark.at_bytes / scale)): mark.sign
               for mark in marks if 0 < mark.at_bytes < scale}  # fmt: skip
    return _assembled(runs, at_cell)


def _assembled(runs: Sequence[tuple[int, str, str]], marks: dict[int, str]) -> Text:
    """Return the text of runs one after the other, with marks instead of some cells."""
    from rich.text import Span, Text

    signs: list[str] = []
    spans = []
    for end, sign, style in runs:
        if end > len(signs):
            spans.append(Span(len(signs), end, style))
            signs += [sign] * (end - len(signs))
    for at, sign in marks.items():
        signs[at] = sign
        spans.append(Span(at, at + 1, "bold not dim default"))
    return Text("".join(signs), spans=spans)


def sparkline(values: Sequence[float], top: float, cells: int, ascii_only: bool = False) -> str:
    """Return the latest `cells` values as a curve of one line, flush right."""
    sparks = _ASCII_SPARKS if ascii_only else _SPARKS
    most = len(sparks) - 1
    shown = [min(most, max(1 if value > 0 else 0, round(most * value / top))) if top > 0 else 0
             for value in values[-cells:]]  # fmt: skip
    return "".join(sparks[level] for level in shown).rjust(cells)
