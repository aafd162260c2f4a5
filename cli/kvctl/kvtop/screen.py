"""The picture that kvtop shows, as lines of text: of a width, and of a height if there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich.text import Text

from kvcached_core import __version__
from kvcached_core.ledger.tools.metric_definitions import asked_bytes
from kvcached_core.units import GIB, MIB
from kvctl.charts import BarMarker, BarSegment, bar, sparkline
from kvctl.kvtop.sampling import DeviceSample, RankKey, RankSample, Sample
from kvctl.listing import state
from kvctl.output import DASH, STATE_STYLES, percent, short_size

ENGINE_COLOURS = (
    "#e5a04f", "#58b6c0", "#b48ead", "#a3be6c", "#d5707a", "#6f9ceb", "#d0c25a", "#8fbfae",
)  # fmt: skip
_ORDERS: dict[str, Callable[[RankSample], object]] = {
    "held": lambda engine: -engine.owner.ready_bytes,
    "name": lambda engine: (engine.owner.name, engine.owner.rank),
    "used": lambda engine: -engine.owner.used_bytes,
    "cached": lambda engine: -engine.owner.cached_bytes,
    "demand": lambda engine: -engine.owner.demand_bytes,
    "leases": lambda engine: -engine.rates.leases,
}
ORDERS = tuple(_ORDERS)
_NAME_CELLS, _STATE_CELLS, _NUMBER_CELLS = 16, 10, 12
_ALL, _NUMBERS, _ROWS = range(3)  # how much is said about each rank that is not selected
_FIRST_CELLS = 5  # selected, marked, and the colour in the device's bar


@dataclass
class ViewState:
    """What the person at the terminal has chosen."""

    selected: RankKey | None = None
    marked: set[RankKey] = field(default_factory=set)
    order: str = ORDERS[0]
    reverse: bool = False
    filter: str = ""
    names: frozenset[str] = frozenset()  # only these engines; empty: all
    refresh_seconds: float = 1.0
    ascii_only: bool = False
    interactive: bool = True


def shown_engines(device: DeviceSample, view: ViewState) -> list[RankSample]:
    """Return the ranks of a device that are shown, in their order."""
    wanted = view.filter.lower()
    engines = [
        engine for engine in device.engines
        if (not view.names or engine.owner.name in view.names)
        and wanted in f"{engine.owner.name} {engine.owner.model} {engine.owner.engine}".lower()
    ]  # fmt: skip
    return sorted(engines, key=_ORDERS[view.order], reverse=view.reverse)  # type: ignore[arg-type]


def rank_keys(picture: Sample, view: ViewState) -> list[RankKey]:
    """Return the ranks from the top of the picture to its bottom."""
    return [engine.key for device in picture.devices for engine in shown_engines(device, view)]


def screen_lines(picture: Sample, view: ViewState, width: int, height: int | None = None) -> list[Text]:
    """Return the lines. What does not fit into `height` is left out: first what all but the selected rank
    say about themselves, then what is farthest from the selected rank."""
    for level in (_ALL, _NUMBERS, _ROWS):
        if height is not None and level != _ROWS and _least(picture, view, level) >= height:
            continue
        body, at = _body(picture, view, width, level)
        if height is None or len(body) < height:
            break
    else:
        assert height is not None
        room = max(1, height - 1)
        first = max(0, min(at - room // 2, len(body) - room))
        body = body[first : first + room]
    lines = [_title(picture, view), *body]
    for line in lines:
        if line.cell_len > width:
            line.truncate(width)
    return lines


def _least(picture: Sample, view: ViewState, level: int) -> int:
    """Return how many lines the ranks take at least: what cannot fit need not be made."""
    count = sum(len(shown_engines(device, view)) for device in picture.devices)
    return count * (_ROWS + 1 - level)


def _body(picture: Sample, view: ViewState, width: int, level: int) -> tuple[list[Text], int]:
    """Return the lines below the title, and which of them is the selected rank's."""
    lines: list[Text] = []
    at = 0
    for device in picture.devices:
        engines = shown_engines(device, view)
        if not engines and (view.names or view.filter):
            continue
        lines += [*([Text()] if lines and level == _ALL else []), *_device(device, view, width)]
        for engine in engines:
            selected = view.interactive and engine.key == view.selected
            if selected:
                at = len(lines)
            lines.append(_row(device, engine, view, width, picture.now_ms))
            if selected or level <= _NUMBERS:
                lines.append(_known_numbers(engine))
            if selected or level == _ALL:
                lines += _more(engine, view, width, picture.now_ms)
    if not lines:
        what = "no engine matches the filter" if view.filter else "no engine is running"
        lines.append(Text(what, "dim"))
    return lines, at


def _title(picture: Sample, view: ViewState) -> Text:
    count = sum(len(shown_engines(device, view)) for device in picture.devices)
    parts = [
        f"kvtop {__version__}", time.strftime("%H:%M:%S", time.localtime(picture.wall_seconds)),
        f"{len(picture.devices)} device{'s' * (len(picture.devices) != 1)}",
        f"{count} rank{'s' * (count != 1)}",
    ]  # fmt: skip
    if view.interactive:
        parts += [f"every {view.refresh_seconds:g} s", f"by {view.order}{' reversed' * view.reverse}"]
        parts += [f"filter {view.filter!r}"] if view.filter else []
        parts += [f"{len(view.marked)} marked"] if view.marked else []
    return Text("  ".join(parts), "bold")


def _device(device: DeviceSample, view: ViewState, width: int) -> list[Text]:
    """Return how much of the device is in use and by whom: KV memory by engine, other use, free."""
    there = device.device
    total = max(there.total_bytes, there.capacity_bytes)
    private = sum(owner.private_now_bytes for owner in there.owners)
    other = private + there.outside_bytes
    used = there.ready_bytes + other
    kind = "Memory Usage" if there.uuid == "host" else "GPU Memory Usage"
    head = Text.assemble(
        (f"{device.place} {there.uuid}", "bold"),
        f"  {kind}: {_long(used)} / {_long(total)} ({percent(used, total)})  ",
    )  # fmt: skip
    head.append(sparkline(device.curve, total, max(0, min(60, width - len(head))), view.ascii_only), "cyan")
    parts = [
        BarSegment(engine_colour(owner.slot), owner.ready_bytes, _engine_shade(owner.slot, view))
        for owner in there.owners
    ]
    whole = bar([*parts, BarSegment("other", other)], total, width, ascii_only=view.ascii_only)
    numbers = (
        f"  KV {short_size(there.ready_bytes)}  other {short_size(other)}  "
        f"free {short_size(max(0, total - used))}  outside {short_size(there.outside_bytes)}  "
        f"leases {device.rates.leases:.1f}/s  reclaims {device.rates.reclaims:.1f}/s"
    )
    lines = [head, whole, Text(numbers)]
    if there.damage:
        lines.append(Text(f"  damaged: {there.damage}", "bold red"))
    return lines


def engine_colour(slot: int) -> str:
    """Return the colour of a slot, the same in its row and in the device's bar."""
    return ENGINE_COLOURS[slot % len(ENGINE_COLOURS)]


def _engine_shade(slot: int, view: ViewState) -> str:
    """Return likewise its shade, which tells neighbours apart without colours."""
    shades = "#%=+" if view.ascii_only else "█▒▓░"
    return shades[slot % len(shades)]


def _row(device: DeviceSample, engine: RankSample, view: ViewState, width: int, now_ms: int) -> Text:
    """Return name, rank, state and the bar of one rank, on the scale of its device."""
    owner, capacity = engine.owner, max(1, device.device.capacity_bytes)
    selected = view.interactive and engine.key == view.selected
    how = state(owner, now_ms)
    text = Text.assemble(
        ">" if selected else " ", "*" if engine.key in view.marked else " ",
        (_engine_shade(owner.slot, view), engine_colour(owner.slot)), " ",
        (_cut(owner.name, _NAME_CELLS), "bold reverse" if selected else "bold"), f"{owner.rank:>3} ",
        (f"{how:<{_STATE_CELLS}}", STATE_STYLES.get(how, "")), " ",
    )  # fmt: skip
    cells = max(4, width - len(text) - _NUMBER_CELLS - 1)
    signs = (":", "|") if view.ascii_only else ("┊", "│")
    marks = [BarMarker(owner.floor_bytes, signs[0]), BarMarker(owner.limit_bytes, signs[1])]
    segments = [
        BarSegment("used", owner.used_bytes), BarSegment("cached", owner.cached_bytes),
        BarSegment("stranded", owner.stranded_bytes), BarSegment("spare", owner.spare_bytes),
    ]  # fmt: skip
    text.append_text(bar(segments, capacity, cells, marks, view.ascii_only, min(capacity, owner.limit_bytes)))
    numbers = f"{short_size(owner.ready_bytes)}/{short_size(min(capacity, owner.limit_bytes))}"
    return text.append(f" {numbers:>{_NUMBER_CELLS}}")


def _known_numbers(engine: RankSample) -> Text:
    """Return the three numbers that add up to the limit."""
    owner = engine.owner
    used = max(0, owner.ready_bytes - owner.spare_bytes)
    free = max(0, owner.limit_bytes - owner.ready_bytes)
    return Text(
        f"{'':{_FIRST_CELLS}}Prealloc: {_long(owner.spare_bytes)} | Used: {_long(used)} / "
        f"{_long(owner.limit_bytes)} ({percent(used, owner.limit_bytes)}) | Free: {_long(free)}"
    )


def _more(engine: RankSample, view: ViewState, width: int, now_ms: int) -> list[Text]:
    """Return the rest, in as many lines as it takes."""
    owner = engine.owner
    sizes = {
        "requests": owner.used_bytes, "cached": owner.cached_bytes, "stranded": owner.stranded_bytes,
        "outside KV": owner.private_now_bytes, "demand": owner.demand_bytes,
        "asked": asked_bytes(owner, now_ms), "floor": owner.floor_bytes,
    }  # fmt: skip
    words = [f"{name} {short_size(size) if size else DASH}" for name, size in sizes.items()]
    words += [
        f"weight {owner.weight_wanted}", f"leases {engine.rates.leases:.1f}/s",
        f"reclaims {engine.rates.reclaims:.1f}/s", owner.engine or DASH, owner.model or DASH,
    ]  # fmt: skip
    lines = [Text(" " * _FIRST_CELLS + line, "dim") for line in _filled(words, width - _FIRST_CELLS)]
    room = width - len(lines[-1]) - 2
    if room >= 10:
        curve = sparkline(engine.curve, max(1, owner.limit_bytes), min(60, room), view.ascii_only)
        lines[-1].append("  ").append(curve, engine_colour(owner.slot))
    return lines


def _filled(words: Iterable[str], width: int) -> list[str]:
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}  {word}".strip()
        if len(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _cut(text: str, cells: int) -> str:
    shown = Text(text)
    shown.truncate(cells, overflow="ellipsis", pad=True)
    return shown.plain


def _long(size_bytes: int) -> str:
    """Write a size with one decimal, in MiB or GiB."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"
