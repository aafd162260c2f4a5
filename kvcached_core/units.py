"""Sizes and switches as people write them."""

from __future__ import annotations

import re
from typing import NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kb": KIB, "kib": KIB,
    "m": MIB, "mb": MIB, "mib": MIB,
    "g": GIB, "gb": GIB, "gib": GIB,
    "t": 1 << 40, "tb": 1 << 40, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*", re.ASCII)
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})
LEGAL_SIZES = "bytes as a plain number, or a number with KiB, MiB, GiB, TiB or %"


class Size(NamedTuple):
    """A size that is either absolute (`bytes`) or a share (`percent`, 0 to 100) of a total."""

    bytes: int = 0
    percent: float | None = None

    def of(self, total_bytes: int) -> int:
        """Return the size in bytes, where `total_bytes` is 100 %."""
        return self.bytes if self.percent is None else int(total_bytes * self.percent / 100)

    def units_of(self, total_bytes: int, unit_bytes: int) -> int:
        """Return how many units of `unit_bytes` hold the size, rounded up, given what 100 % is."""
        return -(-self.of(total_bytes) // unit_bytes)

    def __str__(self) -> str:
        return format_size(self.bytes) if self.percent is None else f"{self.percent:g}%"


def parse_size(text: str | int) -> Size:
    """Parse `16MiB`, `2G`, `50%` or plain bytes; units are powers of 1024.

    Raises ValueError with the legal forms.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in {*_UNITS, "%"}:
        raise ValueError(f"expected {LEGAL_SIZES}")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if number > 100:
            raise ValueError("expected at most 100%")
        return Size(percent=number)
    whole = int(match[1]) if "." not in match[1] else number
    size_bytes = int(whole * _UNITS[unit])
    if size_bytes >= 1 << 62:
        raise ValueError("expected less than 4 EiB")
    return Size(size_bytes)


def parse_switch(text: str | bool | int) -> bool:
    """Parse a switch: `1`, `true`, `yes`, `on`, or `0`, `false`, `no`, `off`, empty; any case.

    Raises ValueError with the legal values.
    """
    word = str(text).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("expected 1, true, yes or on; or 0, false, no or off")
    return word in _TRUE


def format_size(size_bytes: int) -> str:
    """Return a size as text for people: in the largest unit that leaves at least 1, two decimals at most."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{size_bytes} B"
