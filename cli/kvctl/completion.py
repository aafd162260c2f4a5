"""Completion: of shells, by a script, and what may come next in a line, for the script and kvctl's shell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, snapshot
from kvctl.codes import Code
from kvctl.output import print_json, write
from kvctl.spec import COMMANDS, COMMON, Argument, Command, command

_BASH = """\
# kvctl completion for bash: source <(kvctl completion bash)
_kvctl() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(kvctl --complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" \\
        -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _kvctl kvctl
"""
_ZSH = """\
#compdef kvctl
# kvctl completion for zsh: source <(kvctl completion zsh)
_kvctl() {
    local -a found
    found=("${(@f)$(kvctl --complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -- $found
}
compdef _kvctl kvctl
"""
_FISH = """\
# kvctl completion for fish: kvctl completion fish | source
function __kvctl_words
    set -l words (commandline -opc) (commandline -ct)
    kvctl --complete -- $words[2..-1] 2>/dev/null
end
complete -c kvctl -f -a '(__kvctl_words)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def run_completion(arguments: argparse.Namespace) -> Code:
    """Print the script of a shell."""
    script = SCRIPTS[arguments.shell]
    if arguments.json:
        print_json({"shell": arguments.shell, "script": script})
    else:
        write(script)
    return Code.OK


def candidates(words: Sequence[str], engines: Callable[[], Sequence[str]],
               devices: Callable[[], Sequence[str]]) -> list[str]:  # fmt: skip
    """Return what the last of `words`, maybe empty, may become; the first is the command."""
    begun = words[-1] if words else ""
    if len(words) <= 1:
        found = [each.name for each in COMMANDS]
    else:
        known = command(words[0])
        found = [] if known is None else list(_next(known, words[1:-1], begun, engines, devices))
    return sorted({word for word in found if word.startswith(begun)})


def _next(known: Command, before: Sequence[str], begun: str, engines: Callable[[], Sequence[str]],
          devices: Callable[[], Sequence[str]]) -> Iterator[str]:  # fmt: skip
    options = {name: each for each in (*known.arguments, *COMMON) if each.is_option for name in each.names}
    last = options.get(before[-1]) if before else None
    if last is not None and not last.is_switch:
        yield from _values(last, engines, devices)
        return
    if begun.startswith("-"):
        yield from options
        return
    takes_value = [name for name, each in options.items() if not each.is_switch]
    given = [word for at, word in enumerate(before)
             if not word.startswith("-") and (at == 0 or before[at - 1] not in takes_value)]  # fmt: skip
    positionals = [each for each in known.arguments if not each.is_option]
    if positionals and (positionals[-1].many or len(given) < len(positionals)):
        wanted = positionals[min(len(given), len(positionals) - 1)]
        yield from (word for word in _values(wanted, engines, devices) if word not in given)


def _values(argument: Argument, engines: Callable[[], Sequence[str]],
            devices: Callable[[], Sequence[str]]) -> Sequence[str]:  # fmt: skip
    if argument.completes == "engine":
        return engines()
    if argument.completes == "device":
        return devices()
    if argument.completes == "command":
        return [each.name for each in COMMANDS]
    return argument.choices


def running_engines(runtime_dir: str | None = None) -> list[str]:
    """Return the names there are; none where the ledgers cannot be read."""
    return sorted({owner.name for device in _devices(runtime_dir) for owner in device.owners})


def known_devices(runtime_dir: str | None = None) -> list[str]:
    """Return the UUIDs likewise."""
    return [device.uuid for device in _devices(runtime_dir)]


def _devices(runtime_dir: str | None) -> list[DeviceSnapshot]:
    try:
        return snapshot(Runtime.open(runtime_dir, create=False))
    except KVCachedError:
        return []


def complete(words: Sequence[str]) -> int:
    """Print what may come next, a line each: what the scripts call."""
    write("".join(f"{word}\n" for word in candidates(words, running_engines, known_devices)))
    return int(Code.OK)
