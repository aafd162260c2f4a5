"""Every command and option of kvctl, as data: the parser, help, completion and docs/kvctl.md come from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvctl import argument_types
from kvctl.argument_types import MAX_COUNT


class Argument(NamedTuple):
    """A positional argument or an option. `names` has one bare name, or the option's flags."""

    names: tuple[str, ...]
    help: str
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None  # raises ArgumentTypeError
    default: Any = None
    many: bool = False  # a positional that may be repeated or left out
    optional: bool = False  # a positional that may be left out
    choices: tuple[str, ...] = ()
    dest: str | None = None
    completes: str = ""  # "engine", "device", "command" or "folder"

    @property
    def is_option(self) -> bool:
        return self.names[0].startswith("-")

    @property
    def is_switch(self) -> bool:
        """Return whether the option takes no value."""
        return self.is_option and self.parse is None and self.metavar is None and not self.choices

    @property
    def usage(self) -> str:
        """Return the argument as a usage line shows it."""
        if not self.is_option:
            name = self.metavar or self.names[0].upper()
            return f"[{name}{' ...' if self.many else ''}]" if self.many or self.optional else name
        value = self.metavar or "|".join(self.choices)
        return ", ".join(self.names) + (f" {value}" if value else "")


class Command(NamedTuple):
    """A command. `run` names its module and function; `examples` are command lines, each with a comment."""

    name: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]
    run: tuple[str, str]
    examples: tuple[tuple[str, str], ...]


def _option(*names: str, help: str, **rest: Any) -> Argument:
    return Argument(names, help, **rest)


COMMON = (
    _option("--json", help="print one JSON object with a version number; sizes are plain bytes"),
    _option("--runtime-dir", metavar="DIR", completes="folder",
            help="the directory of the ledgers (default: KVCACHED_RUNTIME_DIR, or /dev/shm/kvcached-UID)"),
    _option("--device", metavar="DEVICE", completes="device",
            help="only this device: its UUID, the beginning of its UUID, or its number in kvctl list "
                 "(default: all devices)"),
    _option("--color", choices=("auto", "always", "never"), default="auto",
            help="when to print colours (default auto: on a terminal, unless NO_COLOR is set)"),
)  # fmt: skip
_NAME = Argument(("name",), "the name of the engine, as in kvctl list", "NAME", completes="engine")
_NAMES = Argument(
    ("names",), "only the engines of these names (default: all)", "NAME", many=True, completes="engine"
)
_WIDE = _option("--wide", help="also show engine version, model and worker process id")
_WAIT = (
    _option("--wait", metavar="SECONDS", parse=argument_types.wait_seconds, default=5.0,
            help="how long to wait until every rank has complied (default 5)"),
    _option("--no-wait", help="do not wait"),
)  # fmt: skip
_SIZE = Argument(
    ("value",), "a size: 512M, 2G, 1.5GiB, 50% (of the device) or plain bytes", "SIZE", argument_types.size
)
_LIMIT_WAITS = (
    "The command waits up to 5 s (--wait) until every rank holds no more than that; otherwise it exits with "
    "4 and the engine goes on shrinking. Running requests are not stopped: the engine gives their memory "
    "back when they end."
)
_ACKNOWLEDGED = (
    "The command waits up to 5 s (--wait) until every rank has acknowledged the {0}; otherwise it exits with "
    "4 and the {0} stays set."
)

COMMANDS = (
    Command(
        "list", "show the engines and the memory they hold",
        "Shows each device and the engines on it. USED is memory in requests' blocks, CACHED is memory that "
        "only the prefix cache keeps, SPARE is memory that exists and is empty, and HELD is all memory that "
        "exists. FLOOR, LIMIT and WEIGHT are the engine's settings. DEMAND is memory the engine wants and "
        "has not been granted; ASKED is memory the engine was asked to give back and still holds.",
        (_NAMES, _WIDE),
        ("kvctl.commands.list", "run_list"),
        (("kvctl list", "all engines"), ("kvctl list llama --json", "one engine, for a script")),
    ),
    Command(
        "limit", "set the most memory that each rank of an engine may hold",
        f"Sets the most KV memory that each rank of the engine may hold on its device. {_LIMIT_WAITS}",
        (_NAME, _SIZE, *_WAIT),
        ("kvctl.commands.controls", "run_limit"),
        (("kvctl limit llama 20G", "at most 20 GiB on each device"),
         ("kvctl limit llama 100%", "no limit but the size of the device")),
    ),
    Command(
        "limit-percent", "set the limit in percent of the device",
        f"Sets the limit as a percentage of the device's memory. {_LIMIT_WAITS}",
        (_NAME, Argument(("value",), "0 to 100", "PCT", argument_types.percent), *_WAIT),
        ("kvctl.commands.controls", "run_limit"),
        (("kvctl limit-percent llama 40", "at most 40 % of each device"),),
    ),
    Command(
        "floor", "set the memory that each rank of an engine can always get back",
        "Sets the KV memory that each rank of the engine can always get back: other engines preempt requests "
        "if they must. A floor is refused if the floors of all engines do not fit on the device together. "
        + _ACKNOWLEDGED.format("floor"),
        (_NAME, _SIZE, *_WAIT),
        ("kvctl.commands.controls", "run_floor"),
        (("kvctl floor llama 4G", "llama can always get 4 GiB back"),),
    ),
    Command(
        "weight", "set an engine's share of memory when demand exceeds the device",
        "Sets the weight. When two engines want more than the device has, an engine with weight 200 gets "
        "twice as much as an engine with weight 100. " + _ACKNOWLEDGED.format("weight"),
        (_NAME, Argument(("value",), f"1 to {MAX_COUNT} (100 unless set)", "N", argument_types.count),
         *_WAIT),
        ("kvctl.commands.controls", "run_weight"),
        (("kvctl weight llama 200", "twice the share of an engine with weight 100"),),
    ),
    Command(
        "trim", "make an engine give back spare and cached memory",
        "Asks the engine to give back all memory that no request needs: spare memory and its prefix cache. "
        "No request is preempted. The engine may take memory again when it needs it. The command waits "
        "up to 5 s (--wait) until the engine has given the memory back; otherwise it exits with 4 and the "
        "request lapses within a second.",
        (_NAME, *_WAIT),
        ("kvctl.commands.trim", "run_trim"),
        (("kvctl trim llama", "empty llama's prefix cache now"),),
    ),
    Command(
        "delete", "remove the slots of an engine that has ended",
        "Removes the slots of an engine whose workers are dead, with the settings in the slots. With --force "
        "it also resets a running engine's limit to the whole device and its weight to 100. A running engine "
        "keeps its floor, its slots and its memory: memory in use is never freed.",
        (_NAME, _option("--force", help="reset the limit and the weight of a running engine")),
        ("kvctl.commands.delete", "run_delete"),
        (("kvctl delete llama", "remove what a killed server left"),),
    ),
    Command(
        "watch", "show the list again and again",
        "Shows the list every 2 s (--interval) until Ctrl-C. A terminal shows the lists in place; elsewhere "
        "they follow each other. With --json each list is one line.",
        (
            _NAMES,
            _option("-n", "--interval", metavar="SECONDS", parse=argument_types.list_interval, default=2.0,
                    help="the time between two lists, at least 0.1 (default 2)"),
            _option("--count", metavar="N", parse=argument_types.count,
                    help="exit after N lists (default: go on until Ctrl-C)"),
            _WIDE,
        ),
        ("kvctl.commands.watch", "run_watch"),
        (("kvctl watch -n 1 llama", "one engine, every second"),),
    ),
    Command(
        "kvtop", "show devices and engines live, as bars",
        "Shows each device and each engine on it as bars, live. The key q leaves and h shows all keys. The "
        "program kvtop does the same.",
        (
            _NAMES,
            _option("--refresh", metavar="SECONDS", parse=argument_types.refresh_interval, default=1.0,
                    help="the time between two updates, at least 0.25 (default 1)"),
            _option("--once", help="print the bars once and exit"),
            _option("--readonly", help="disable the keys that change settings"),
        ),
        ("kvctl.commands.kvtop", "run_kvtop"),
        (("kvctl kvtop", "all engines, live"), ("kvctl kvtop --once", "once, for a report")),
    ),
    Command(
        "history", "show the latest events",
        "Shows the latest events of each device, the newest last: starts, leases, reclaims, evictions, "
        "preemptions, changed limits, and memory taken by processes outside the ledger. Events of engines "
        "that have ended are included.",
        (_NAMES, _option("-n", "--count", metavar="N", parse=argument_types.count, default=50, dest="count",
                         help="show at most N events (default 50)")),
        ("kvctl.commands.history", "run_history"),
        (("kvctl history -n 20 llama", "the last 20 events of llama"),),
    ),
    Command(
        "check", "check that every ledger is consistent",
        "Checks the invariants of every ledger, such as: no byte is leased twice, all floors fit on the "
        "device, no rank has two slots. Exits with 5 if an invariant is broken.",
        (), ("kvctl.commands.check", "run_check"),
        (("kvctl check && echo consistent", "in a script"),),
    ),
    Command(
        "doctor", "find problems on this machine and show all settings",
        "Checks packages, plugins, CUDA driver, host, runtime directory and ledgers, and shows every setting "
        "with its value and where the value comes from. Exits with 1 if it finds an error, and with 5 if a "
        "ledger is damaged.",
        (), ("kvctl.commands.doctor", "run_doctor"),
        (("kvctl doctor", "run it before you ask for help"),),
    ),
    Command(
        "export", "print or serve metrics for Prometheus",
        "Prints the metrics of all ledgers in Prometheus' text format. With --port it serves them at "
        "/metrics until it is stopped, and reads the ledgers only when they are scraped.",
        (
            _option("--port", metavar="PORT", parse=argument_types.port,
                    help="serve at this port instead of printing; 0 means any free port"),
            _option("--bind", metavar="ADDRESS", default="127.0.0.1",
                    help="the address to serve at (default 127.0.0.1, this machine only)"),
        ),
        ("kvctl.commands.export", "run_export"),
        (("kvctl export --port 9477", "for Prometheus on this machine"),),
    ),
    Command(
        "completion", "print the completion script for a shell",
        "Prints a script with which your shell completes commands, options and the names of engines.",
        (Argument(("shell",), "the shell", "SHELL", choices=("bash", "zsh", "fish")),),
        ("kvctl.commands.completion", "run_completion"),
        (("source <(kvctl completion bash)", "in this bash"),),
    ),
    Command(
        "help", "show the help of a command",
        "Shows all commands, or the help of one command.",
        (Argument(("topic",), "the command", "COMMAND", optional=True, completes="command"),),
        ("kvctl.commands.help", "run_help"),
        (("kvctl help limit", ""),),
    ),
)  # fmt: skip
EXIT_CODES = (
    (0, "done"),
    (1, "failed"),
    (2, "wrong usage"),
    (3, "no engine has this name"),
    (4, "still waiting when --wait ended; a limit, floor or weight stays set"),
    (5, "a ledger is damaged or breaks an invariant"),
    (130, "interrupted with Ctrl-C"),
)


def command(name: str) -> Command | None:
    """Return the command with this name, or None."""
    return next((found for found in COMMANDS if found.name == name), None)
