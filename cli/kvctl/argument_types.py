"""Parse option values. Each function raises ArgumentTypeError with the values that are legal."""

from __future__ import annotations

import argparse
import math

from kvcached_core.units import Size, parse_size

MAX_COUNT = 1_000_000  # the largest weight and the largest number of events
_DAY_SECONDS = 86400.0


def size(text: str) -> Size:
    """Parse a size: a number of bytes, or a percentage of the device."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def percent(text: str) -> Size:
    """Parse a percentage, with or without a percent sign."""
    try:
        return parse_size(text.removesuffix("%") + "%")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 100") from None


def count(text: str) -> int:
    """Parse a number from 1 to a million."""
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= MAX_COUNT or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to {MAX_COUNT}")
    return int(text)


def wait_seconds(text: str) -> float:
    """Parse the longest time to wait; 0 is allowed."""
    return _seconds(text, 0.0)


def list_interval(text: str) -> float:
    """Parse the interval at which `watch` shows the list: at least 0.1 s."""
    return _seconds(text, 0.1)


def refresh_interval(text: str) -> float:
    """Parse the interval at which kvtop draws: at least 0.25 s."""
    return _seconds(text, 0.25)


def port(text: str) -> int:
    """Parse a TCP port; 0 means any free port."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port, 0 to 65535")
    return int(text)


def _seconds(text: str, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= _DAY_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {least:g} to {_DAY_SECONDS:g} seconds")
    return number
