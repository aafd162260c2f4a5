"""The lines that kvtop shows, cut to a width and, if given, to a height."""

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
    "held": lambda rank: -rank.owner.ready_bytes,
    "name": lambda rank: (rank.owner.name, rank.owner.rank),
    "used": lambda rank: -rank.owner.used_bytes,
    "cached": lambda rank: -rank.owner.cached_bytes,
    "demand": lambda rank: -rank.owner.demand_bytes,
    "leases": lambda rank: -rank.rates.leases,
}
ORDERS = tuple(_ORDERS)
_NAME_CELLS, _STATE_CELLS, _NUMBER_CELLS = 16, 10, 12
_ALL, _NUMBERS, _ROWS = range(3)  # the detail shown for ranks that are not selected
_INDENT_CELLS = 5  # the signs for selected and marked, and the colour in the device's bar


@dataclass
class ViewState:
    """The user's choices: selection, marks, order, filter and options."""

    selected: RankKey | None = None
    marked: set[RankKey] = field(default_factory=set)
    order: str = ORDERS[0]
    reverse: bool = False
    filter: str = ""
    names: frozenset[str] = frozenset()  # only these engines; empty: all
    refresh_seconds: float = 1.0
    ascii_only: bool = False
    interactive: bool = True


def shown_ranks(device: DeviceSample, view: ViewState) -> list[RankSample]:
    """Return the ranks of a device that match the filter, in the chosen order."""
    wanted = view.filter.lower()
    ranks = [
        rank for rank in device.ranks
        if (not view.names or rank.owner.name in view.names)
        and wanted in f"{rank.owner.name} {rank.owner.model} {rank.owner.engine}".lower()
    ]  # fmt: skip
    return sorted(ranks, key=_ORDERS[view.order], reverse=view.reverse)  # type: ignore[arg-type]


def rank_keys(sample: Sample, view: ViewState) -> list[RankKey]:
    """Return the keys of all ranks shown, from top to bottom."""
    return [rank.key for device in sample.devices for rank in shown_ranks(device, view)]


def screen_lines(sample: Sample, view: ViewState, width: int, height: int | None = None) -> list[Text]:
    """Return the lines. If they exceed `height`, ranks that are not selected lose their details first; then
    the lines farthest from the selected rank are left out."""
    for level in (_ALL, _NUMBERS, _ROWS):
        if height is not None and level != _ROWS and _least_lines(sample, view, level) >= height:
            continue
        body, selected_at = _body(sample, view, width, level)
        if height is None or len(body) < height:
            break
    else:
        assert height is not None
        room = max(1, height - 1)
        first = max(0, min(selected_at - room // 2, len(body) - room))
        body = body[first : first + room]
    lines = [_title(sample, view), *body]
    for line in lines:
        if line.cell_len > width:
            line.truncate(width)
    return lines


def _least_lines(sample: Sample, view: ViewState, level: int) -> int:
    """Return the least number of lines that the ranks take. Lines that cannot fit need not be made."""
    count = sum(len(shown_ranks(device, view)) for device in sample.devices)
    return count * (_ROWS + 1 - level)


def _body(sample: Sample, view: ViewState, width: int, level: int) -> tuple[list[Text], int]:
    """Return the lines below the title, and the index of the selected rank's line."""
    lines: list[Text] = []
    selected_at = 0
    for device in sample.devices:
        ranks = shown_ranks(device, view)
        if not ranks and (view.names or view.filter):
            continue
        lines += [*([Text()] if lines and level == _ALL else []), *_device(device, view, width)]
        for rank in ranks:
            selected = view.interactive and rank.key == view.selected
            if selected:
                selected_at = len(lines)
            lines.append(_row(device, rank, view, width, sample.now_ms))
            if selected or level <= _NUMBERS:
                lines.append(_memory_line(rank))
            if selected or level == _ALL:
                lines += _detail_lines(rank, view, width, sample.now_ms)
    if not lines:
        message = "no engine matches the filter" if view.filter else "no engine is running"
        lines.append(Text(message, "dim"))
    return lines, selected_at


def _title(sample: Sample, view: ViewState) -> Text:
    count = sum(len(shown_ranks(device, view)) for device in sample.devices)
    parts = [
        f"kvtop {__version__}", time.strftime("%H:%M:%S", time.localtime(sample.wall_seconds)),
        f"{len(sample.devices)} device{'s' * (len(sample.devices) != 1)}",
        f"{count} rank{'s' * (count != 1)}",
    ]  # fmt: skip
    if view.interactive:
        parts += [f"every {view.refresh_seconds:g} s", f"by {view.order}{' reversed' * view.reverse}"]
        parts += [f"filter {view.filter!r}"] if view.filter else []
        parts += [f"{len(view.marked)} marked"] if view.marked else []
    return Text("  ".join(parts), "bold")


def _device(device: DeviceSample, view: ViewState, width: int) -> list[Text]:
    """Return the device's memory as a bar and in numbers: KV memory by engine, other memory, free memory."""
    ledger = device.snapshot
    total = max(ledger.total_bytes, ledger.capacity_bytes)
    private = sum(owner.private_now_bytes for owner in ledger.owners)
    other = private + ledger.outside_bytes
    used = ledger.ready_bytes + other
    kind = "Memory Usage" if ledger.uuid == "host" else "GPU Memory Usage"
    head = Text.assemble(
        (f"{device.place} {ledger.uuid}", "bold"),
        f"  {kind}: {_long(used)} / {_long(total)} ({percent(used, total)})  ",
    )  # fmt: skip
    cells = max(0, min(60, width - len(head)))
    head.append(sparkline(device.held_history, total, cells, view.ascii_only), "cyan")
    segments = [
        BarSegment(engine_colour(owner.slot), owner.ready_bytes, _engine_shade(owner.slot, view))
        for owner in ledger.owners
    ]
    whole = bar([*segments, BarSegment("other", other)], total, width, ascii_only=view.ascii_only)
    numbers = (
        f"  KV {short_size(ledger.ready_bytes)}  other {short_size(other)}  "
        f"free {short_size(max(0, total - used))}  outside {short_size(ledger.outside_bytes)}  "
        f"leases {device.rates.leases:.1f}/s  reclaims {device.rates.reclaims:.1f}/s"
    )
    lines = [head, whole, Text(numbers)]
    if ledger.damage:
        lines.append(Text(f"  damaged: {ledger.damage}", "bold red"))
    return lines


def engine_colour(slot: int) -> str:
    """Return the colour of a slot. Its row and the device's bar have the same colour."""
    return ENGINE_COLOURS[slot % len(ENGINE_COLOURS)]


def _engine_shade(slot: int, view: ViewState) -> str:
    """Return the shade of a slot, which tells neighbours apart without colours."""
    shades = "#%=+" if view.ascii_only else "█▒▓░"
    return shades[slot % len(shades)]


def _row(device: DeviceSample, rank: RankSample, view: ViewState, width: int, now_ms: int) -> Text:
    """Return name, rank number, state and bar of one rank, on the scale of its device."""
    owner, capacity = rank.owner, max(1, device.snapshot.capacity_bytes)
    selected = view.interactive and rank.key == view.selected
    state_name = state(owner, now_ms)
    text = Text.assemble(
        ">" if selected else " ", "*" if rank.key in view.marked else " ",
        (_engine_shade(owner.slot, view), engine_colour(owner.slot)), " ",
        (_cut(owner.name, _NAME_CELLS), "bold reverse" if selected else "bold"), f"{owner.rank:>3} ",
        (f"{state_name:<{_STATE_CELLS}}", STATE_STYLES.get(state_name, "")), " ",
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


def _memory_line(rank: RankSample) -> Text:
    """Return preallocated, used and free memory, which add up to the limit."""
    owner = rank.owner
    used = max(0, owner.ready_bytes - owner.spare_bytes)
    free = max(0, owner.limit_bytes - owner.ready_bytes)
    return Text(
        f"{'':{_INDENT_CELLS}}Prealloc: {_long(owner.spare_bytes)} | Used: {_long(used)} / "
        f"{_long(owner.limit_bytes)} ({percent(used, owner.limit_bytes)}) | Free: {_long(free)}"
    )


def _detail_lines(rank: RankSample, view: ViewState, width: int, now_ms: int) -> list[Text]:
    """Return all other numbers of a rank, in as many lines as they need."""
    owner = rank.owner
    sizes = {
        "requests": owner.used_bytes, "cached": owner.cached_bytes, "stranded": owner.stranded_bytes,
        "outside KV": owner.private_now_bytes, "demand": owner.demand_bytes,
        "asked": asked_bytes(owner, now_ms), "floor": owner.floor_bytes,
    }  # fmt: skip
    words = [f"{name} {short_size(size) if size else DASH}" for name, size in sizes.items()]
    words += [
        f"weight {owner.weight_wanted}", f"leases {rank.rates.leases:.1f}/s",
        f"reclaims {rank.rates.reclaims:.1f}/s", owner.engine or DASH, owner.model or DASH,
    ]  # fmt: skip
    lines = [Text(" " * _INDENT_CELLS + line, "dim") for line in _wrapped(words, width - _INDENT_CELLS)]
    room = width - len(lines[-1]) - 2
    if room >= 10:
        curve = sparkline(rank.held_history, max(1, owner.limit_bytes), min(60, room), view.ascii_only)
        lines[-1].append("  ").append(curve, engine_colour(owner.slot))
    return lines


def _wrapped(words: Iterable[str], width: int) -> list[str]:
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
    """Return a size with one decimal, in MiB or GiB."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"
