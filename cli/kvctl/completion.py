"""Completion of command lines, for kvctl's own shell and for the completion scripts of other shells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, snapshot
from kvctl.command_definitions import COMMANDS, COMMON, Argument, Command, command
from kvctl.exit_codes import ExitCode
from kvctl.output import write

Names = Callable[[], Sequence[str]]


def candidates(words: Sequence[str], engines: Names, devices: Names) -> list[str]:
    """Return the words that complete the last of `words`, which may be empty. The first is the command."""
    prefix = words[-1] if words else ""
    if len(words) <= 1:
        found = [each.name for each in COMMANDS]
    else:
        typed = command(words[0])
        found = [] if typed is None else list(_next_words(typed, words[1:-1], prefix, engines, devices))
    return sorted({word for word in found if word.startswith(prefix)})


def _next_words(
    typed: Command, before: Sequence[str], prefix: str, engines: Names, devices: Names
) -> Iterator[str]:
    options = {name: each for each in (*typed.arguments, *COMMON) if each.is_option for name in each.names}
    last = options.get(before[-1]) if before else None
    if last is not None and not last.is_switch:
        yield from _values(last, engines, devices)
        return
    if prefix.startswith("-"):
        yield from options
        return
    takes_value = [name for name, each in options.items() if not each.is_switch]
    given = [word for at, word in enumerate(before)
             if not word.startswith("-") and (at == 0 or before[at - 1] not in takes_value)]  # fmt: skip
    positionals = [each for each in typed.arguments if not each.is_option]
    if positionals and (positionals[-1].many or len(given) < len(positionals)):
        expected = positionals[min(len(given), len(positionals) - 1)]
        yield from (word for word in _values(expected, engines, devices) if word not in given)


def _values(argument: Argument, engines: Names, devices: Names) -> Sequence[str]:
    if argument.completes == "engine":
        return engines()
    if argument.completes == "device":
        return devices()
    if argument.completes == "command":
        return [each.name for each in COMMANDS]
    return argument.choices


def running_engines(runtime_dir: str | None = None) -> list[str]:
    """Return the names of all engines in the ledgers; none if the ledgers cannot be read."""
    return sorted({owner.name for device in _devices(runtime_dir) for owner in device.owners})


def known_devices(runtime_dir: str | None = None) -> list[str]:
    """Return the UUIDs of all devices that have a ledger; none if the ledgers cannot be read."""
    return [device.uuid for device in _devices(runtime_dir)]


def _devices(runtime_dir: str | None) -> list[DeviceSnapshot]:
    try:
        return snapshot(Runtime.open(runtime_dir, create=False))
    except KVCachedError:
        return []


def complete(words: Sequence[str]) -> int:
    """Print the words that may come next, one a line. The completion scripts call it."""
    write("".join(f"{word}\n" for word in candidates(words, running_engines, known_devices)))
    return int(ExitCode.OK)
