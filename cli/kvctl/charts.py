"""Bars and sparklines of bytes, for terminals with colours, without colours, and with ASCII only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.text import Text

# Every kind has its own shade as well as its colour, so bars can be read without colours.
COLOURS = {
    "used": "#d9655b", "cached": "#5b93d9", "spare": "#a3c25f", "other": "#8a8a8a", "stranded": "#c79ad0",
}  # fmt: skip
SHADES = {"used": "█", "cached": "▓", "stranded": "▒", "spare": "░", "other": "▞"}
ASCII = {"used": "#", "cached": "=", "stranded": "%", "spare": "+", "other": "x"}
EMPTY, ASCII_EMPTY = "·", "."
_SPARKS, _ASCII_SPARKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


class BarSegment(NamedTuple):
    """A part of a bar. `kind` gives colour and shade; a kind may be a colour itself, with `shade`."""

    kind: str
    size_bytes: int
    shade: str = ""


class BarMarker(NamedTuple):
    """A sign at a number of bytes on a bar."""

    at_bytes: int
    sign: str


def can_draw(encoding: str | None = None) -> bool:
    """Return whether stdout's encoding, or `encoding`, has the shades."""
    try:
        "".join((*SHADES.values(), EMPTY, _SPARKS)).encode(encoding or sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError, AttributeError):
        return False
    return True


def bar(segments: Iterable[BarSegment], scale_bytes: int, cells: int, markers: Sequence[BarMarker] = (),
        ascii_only: bool = False, open_bytes: int | None = None) -> Text:  # fmt: skip
    """Return a bar of `cells` cells, which represent `scale_bytes`.

    Free cells up to `open_bytes` (default: the scale) are dotted. Each edge is rounded from the sum so far,
    so rounding errors do not add up. A segment that is not empty gets at least one cell while cells are left.
    """
    shades, dot = (ASCII, ASCII_EMPTY) if ascii_only else (SHADES, EMPTY)
    scale, total = max(scale_bytes, 1), 0
    runs: list[tuple[int, str, str]] = []  # end, sign and style of each
    drawn = 0
    for kind, size_bytes, own_shade in segments:
        total += max(0, size_bytes)
        edge = min(cells, round(cells * total / scale))
        if size_bytes > 0 and edge == drawn:
            edge = min(cells, drawn + 1)
        if edge > drawn:
            runs.append((edge, own_shade or shades[kind], COLOURS.get(kind, kind)))
            drawn = edge
    room = cells if open_bytes is None else min(cells, round(cells * open_bytes / scale))
    runs += [(max(drawn, room), dot, "dim"), (cells, " ", "")]
    signs = {min(cells - 1, round(cells * marker.at_bytes / scale)): marker.sign
             for marker in markers if 0 < marker.at_bytes < scale}  # fmt: skip
    return _assembled(runs, signs)


def _assembled(runs: Sequence[tuple[int, str, str]], markers: dict[int, str]) -> Text:
    """Join the runs, with a marker in place of the cell at its position."""
    from rich.text import Span, Text

    signs: list[str] = []
    spans = []
    for end, sign, style in runs:
        if end > len(signs):
            spans.append(Span(len(signs), end, style))
            signs += [sign] * (end - len(signs))
    for at, sign in markers.items():
        signs[at] = sign
        spans.append(Span(at, at + 1, "bold not dim default"))
    return Text("".join(signs), spans=spans)


def sparkline(values: Sequence[float], top: float, cells: int, ascii_only: bool = False) -> str:
    """Return the latest `cells` values as a curve in one line, flush right."""
    sparks = _ASCII_SPARKS if ascii_only else _SPARKS
    most = len(sparks) - 1
    shown = [min(most, max(1 if value > 0 else 0, round(most * value / top))) if top > 0 else 0
             for value in values[-cells:]]  # fmt: skip
    return "".join(sparks[level] for level in shown).rjust(cells)
