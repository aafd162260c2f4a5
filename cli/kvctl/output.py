"""Data on stdout, messages on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvcached_core.units import GIB, KIB, MIB

JSON_VERSION = 1
DASH = "-"
_WIDTH_WITHOUT_TERMINAL = 200


def print_json(data: Mapping[str, Any]) -> None:
    """Print one object; its layout changes only with its `version`."""
    print(json.dumps({"version": JSON_VERSION, **data}, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; a column whose title begins with `>` is flush right. Colours only on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    Console(width=width).print(table)


def short_size(size_bytes: int) -> str:
    """Write a size for a narrow column, as 1.53G: its first digits and the unit's first letter."""
    for unit, factor in (("T", 1 << 40), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes >= factor:
            number = size_bytes / factor
            digits = f"{number:.0f}" if number >= 99.95 else f"{number:.3g}"
            return digits + unit
    return str(size_bytes)


def say(message: str) -> None:
    """Print a message for people."""
    print(f"kvctl: {message}", file=sys.stderr)
