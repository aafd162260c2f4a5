"""The settings of one engine: option names, defaults, legal values. Read once, then frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError
from .foreign_settings import advice
from .units import LEGAL_SIZES, MIB, Size, parse_size, parse_switch

SWITCH_VARIABLE = "ENABLE_KVCACHED"


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one engine. A size in percent is a part of the device's capacity."""

    runtime_dir: str = ""
    name: str = ""
    driver: str = "auto"
    host_capacity: Size = Size(percent=80.0)
    limit: Size = Size(percent=100.0)
    floor: Size | None = None
    weight: int = 100
    virtual: Size = Size(percent=100.0)
    max_blocks: int = 1 << 18
    page_size: Size | None = None
    layout: str = "auto"
    headroom: Size = Size(256 * MIB)
    spare: Size = Size(128 * MIB)
    idle_seconds: float = 2.0
    cache_seconds: float = 0.0
    grant_seconds: float = 0.02
    keep_seconds: float = 1.0
    start_seconds: float = 300.0
    start_size: Size | None = None


class Option(NamedTuple):
    """One option: its name, its environment variable, default and legal values."""

    name: str
    variable: str
    default: str
    legal: str
    help: str
    parse: Callable[[str], Any]


class Setting(NamedTuple):
    """The value of an option and its source: `option`, the variable's name, or `default`."""

    name: str
    variable: str
    value: str
    source: str


def _choice(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return parse


def _absolute(text: str) -> Size:
    size = _amount(text)
    if size.bytes <= 0:
        raise ValueError
    return size


def _amount(text: str) -> Size:
    size = parse_size(text)
    if size.percent is not None:
        raise ValueError
    return size


def _number(low: float, high: float, kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _auto(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "auto" else parse(text)


def _option(name: str, legal: str, text: str, parse: Callable[[str], Any], default: str) -> Option:
    return Option(name, f"KVCACHED_{name.upper()}", default, legal, text, parse)


OPTIONS: tuple[Option, ...] = (
    _option("runtime_dir", "a directory", "where the ledgers are; default: kvcached-<uid> in /dev/shm",
            str, ""),
    _option("name", "a word", "name of this engine in tools; default: the served model's name", str, ""),
    _option("driver", "auto, or the name of a driver", "driver that provides the memory; auto: by device",
            str, "auto"),
    _option("host_capacity", LEGAL_SIZES, "host memory that engines on the host share", parse_size, "80%"),
    _option("limit", LEGAL_SIZES, "most memory that this engine may hold on each device", parse_size, "100%"),
    _option("floor", f"auto, or {LEGAL_SIZES}", "memory that this engine can always get back; auto: enough "
            "for one request of the maximum length", _auto(parse_size), "auto"),
    _option("weight", "1 to 1000000", "share of this engine when demand exceeds the device",
            _number(1, 1_000_000, int), "100"),
    _option("virtual", LEGAL_SIZES, "addresses reserved for the KV cache", parse_size, "100%"),
    _option("max_blocks", "1024 to 16777216", "most blocks of the KV cache; more make the start longer",
            _number(1024, 1 << 24, int), "262144"),
    _option("page_size", "auto, or a size that is a multiple of the driver's granularity",
            "unit of physical memory", _auto(_absolute), "auto"),
    _option("layout", "auto, block, layer or engine", "placement of the KV cache. block: smallest granules; "
            "layer (SGLang only): keys and values of a layer together; engine: as in the stock engine; auto: "
            "block where it is proven, else engine", _choice("auto", "block", "layer", "engine"), "auto"),
    _option("headroom", LEGAL_SIZES, "memory left free on the device for other processes", parse_size,
            "256MiB"),
    _option("spare", LEGAL_SIZES, "memory kept ready ahead of need", parse_size, "128MiB"),
    _option("idle_seconds", "0 to 86400", "time after which unused spare memory is given back",
            _number(0, 86400), "2"),
    _option("cache_seconds", "0 to 31536000", "time after which unused cached blocks are evicted; 0: never",
            _number(0, 31536000), "0"),
    _option("grant_seconds", "0 to 1", "longest wait of a step for memory on its way, before it preempts",
            _number(0, 1), "0.02"),
    _option("keep_seconds", "0 to 3600", "time for which memory that requests waited for can be reclaimed "
            "only for another engine's floor", _number(0, 3600), "1"),
    _option("start_seconds", "0 to 86400", "longest wait of this engine for room to start",
            _number(0, 86400), "300"),
    _option("start_size", "auto, or bytes as a plain number or with KiB, MiB, GiB, TiB",
            "memory outside the KV cache, claimed before the engine loads; auto: estimated",
            _auto(_amount), "auto"),
)  # fmt: skip

_BY_NAME = {option.name: option for option in OPTIONS}


def load(options: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """Return the settings. Options of the engine win over KVCACHED_* variables, and variables over defaults.

    Raises ConfigError, which names the option or variable and its legal values.
    """
    _refuse_unknown(options, environ)
    values = {}
    for option in OPTIONS:
        label, text = _lookup(option, options, environ)
        if text is None:
            continue
        values[option.name] = _parse(option, label, text)
    return Config(**values)


def explain(environ: Mapping[str, str], options: Mapping[str, Any] | None = None) -> list[Setting]:
    """Return every setting with its value and source. Raises ConfigError as `load` does."""
    options = options or {}
    load(options, environ)
    settings = []
    for option in OPTIONS:
        label, text = _lookup(option, options, environ)
        source = "default" if text is None else ("option" if option.name in options else label)
        settings.append(
            Setting(option.name, option.variable, option.default if text is None else text, source)
        )
    return settings


def enabled(environ: Mapping[str, str]) -> bool:
    """Say whether ENABLE_KVCACHED is on. Raises ConfigError if its value is not a switch."""
    text = environ.get(SWITCH_VARIABLE, "")
    try:
        return parse_switch(text)
    except ValueError as error:
        raise ConfigError(f"{SWITCH_VARIABLE}={text!r}: {error}") from None


def _lookup(option: Option, options: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[str, str | None]:
    if option.name in options:
        return f"kvcached.{option.name}", str(options[option.name])
    return option.variable, environ.get(option.variable) or None


def _parse(option: Option, label: str, text: str) -> Any:
    try:
        return option.parse(text)
    except ValueError:
        raise ConfigError(f"{label}={text!r}: expected {option.legal}") from None


def _refuse_unknown(options: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    known_variables = {option.variable for option in OPTIONS}
    unknown = [f"kvcached.{key}" for key in options if key not in _BY_NAME]
    unknown += [key for key in environ if key.startswith("KVCACHED_") and key not in known_variables]
    if unknown:
        known = f"known are {', '.join(_BY_NAME)} (variables: KVCACHED_ and the name in capitals)"
        hints = [hint for name in sorted(unknown) if (hint := advice(name))]
        # a list of all settings helps only where a name is left that no hint explains
        text = "; ".join([*hints, known] if len(hints) < len(unknown) else hints)
        raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}: {text}")
