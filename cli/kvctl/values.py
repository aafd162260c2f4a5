"""Values as people write them; each function raises ArgumentTypeError with what is legal."""

from __future__ import annotations

import argparse
import math

from kvcached_core.units import Size, parse_size

MOST = 1_000_000  # of weights and of events
_DAY_SECONDS = 86400.0


def size(text: str) -> Size:
    """Read a size: absolute, or a share of the device."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def percent(text: str) -> Size:
    """Read a percentage, with or without its sign."""
    try:
        return parse_size(text.removesuffix("%") + "%")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 100") from None


def whole(text: str) -> int:
    """Read a number from 1 to a million."""
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= MOST or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to {MOST}")
    return int(text)


def seconds(text: str) -> float:
    """Read how long to wait."""
    return _between(text, 0.0)


def interval(text: str) -> float:
    """Read how often to show the list."""
    return _between(text, 0.1)


def refresh(text: str) -> float:
    """Read how often to draw the live picture."""
    return _between(text, 0.25)


def port(text: str) -> int:
    """Read a TCP port; 0 is any free one."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port, 0 to 65535")
    return int(text)


def _between(text: str, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= _DAY_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {least:g} to {_DAY_SECONDS:g} seconds")
    return number
