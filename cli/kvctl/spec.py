"""Every command and option of kvctl, as data: parser, help, completion and documentation are made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvctl import values
from kvctl.values import MOST


class Argument(NamedTuple):
    """A positional argument or an option. `names`: one bare name, or flags."""

    names: tuple[str, ...]
    help: str
    metavar: str | None = None
    kind: Callable[[str], Any] | None = None
    default: Any = None
    many: bool = False  # any number of positionals
    optional: bool = False  # a positional that may be missing
    choices: tuple[str, ...] = ()
    dest: str | None = None
    completes: str = ""  # "engine", "device", "command" or "folder"

    @property
    def is_option(self) -> bool:
        return self.names[0].startswith("-")

    @property
    def is_switch(self) -> bool:
        return self.is_option and self.kind is None and self.metavar is None and not self.choices

    @property
    def shown(self) -> str:
        """As a person writes it."""
        if not self.is_option:
            name = self.metavar or self.names[0].upper()
            return f"[{name}{' ...' if self.many else ''}]" if self.many or self.optional else name
        value = self.metavar or "|".join(self.choices)
        return ", ".join(self.names) + (f" {value}" if value else "")


class Command(NamedTuple):
    """A command. `run` names the module and the function that carry it out."""

    name: str
    about: str
    text: str
    arguments: tuple[Argument, ...]
    run: tuple[str, str]
    examples: tuple[tuple[str, str], ...]


def _option(*names: str, help: str, **rest: Any) -> Argument:
    return Argument(names, help, **rest)


COMMON = (
    _option("--json", help="print one JSON object with a version; sizes are plain bytes"),
    _option("--runtime-dir", metavar="DIR", help="where the ledgers are; default: KVCACHED_RUNTIME_DIR",
            completes="folder"),
    _option("--device", metavar="DEVICE", completes="device",
            help="only this one: a UUID, the beginning of one, or a place in the list; default: all"),
    _option("--color", choices=("auto", "always", "never"), default="auto",
            help="auto: on a terminal, unless NO_COLOR is set"),
)  # fmt: skip
_NAME = Argument(("name",), "the engine", "NAME", completes="engine")
_NAMES = Argument(("names",), "only these engines", "NAME", many=True, completes="engine")
_WAIT = (
    _option("--wait", metavar="SECONDS", kind=values.seconds, default=5.0,
            help="how long to wait until it holds (default 5)"),
    _option("--no-wait", help="set it and return at once"),
)  # fmt: skip
_SIZE_HELP = "as 512M, 2G, 1.5GiB, 50%% (of the device) or plain bytes".replace("%%", "%")
_ACKNOWLEDGED = (
    "It is set on every rank, each rank acknowledges it, and the command waits until it holds; if that takes "
    "longer than --wait it ends with 4, and what was set stays set."
)

COMMANDS = (
    Command(
        "list", "show engines and what they hold",
        "Shows every device with the engines on it: what requests use, what the prefix cache keeps, what is "
        "spare, and what is held in all; the limits that were set; what is missing, and what the engine is "
        "asked to give back.",
        (_NAMES, _option("--wide", help="with engine, model and pid of the worker")),
        ("kvctl.listing", "run_list"),
        (("kvctl list", "all engines"), ("kvctl list llama --json", "one of them, for a script")),
    ),
    Command(
        "limit", "limit what each rank of an engine may hold",
        f"Sets what each rank may hold of its device. {_ACKNOWLEDGED} Requests that run are not ended for a "
        "limit: what they hold goes as they end.",
        (_NAME, Argument(("value",), _SIZE_HELP, "SIZE", values.size), *_WAIT),
        ("kvctl.controls", "run_limit"),
        (("kvctl limit llama 20G", "at most 20 GiB on each device"),
         ("kvctl limit llama 100%", "no limit but the device")),
    ),
    Command(
        "limit-percent", "likewise, in percent of the device",
        f"Sets the limit as a share of the device's memory. {_ACKNOWLEDGED}",
        (_NAME, Argument(("value",), "0 to 100", "PCT", values.percent), *_WAIT),
        ("kvctl.controls", "run_limit"),
        (("kvctl limit-percent llama 40", "at most 40 % of each device"),),
    ),
    Command(
        "floor", "set what each rank of an engine can always get back",
        f"Sets the floor. {_ACKNOWLEDGED} Floors that do not fit on the device together are refused.",
        (_NAME, Argument(("value",), _SIZE_HELP, "SIZE", values.size), *_WAIT),
        ("kvctl.controls", "run_floor"),
        (("kvctl floor llama 4G", "4 GiB are given back to it whenever it needs them"),),
    ),
    Command(
        "weight", "set its share when there is not enough for all",
        f"Sets the weight: 200 gets twice what 100 gets while both need more. {_ACKNOWLEDGED}",
        (_NAME, Argument(("value",), f"1 to {MOST}; 100 if never set", "N", values.whole), *_WAIT),
        ("kvctl.controls", "run_weight"),
        (("kvctl weight llama 200", "twice the share of the others"),),
    ),
    Command(
        "trim", "let an engine give back what is spare and cached",
        "Asks the engine to give back all that no request needs: spare memory and its prefix cache. Nothing "
        "is preempted. It is asked once: what it needs later it may take again.",
        (_NAME, *_WAIT),
        ("kvctl.trimming", "run_trim"),
        (("kvctl trim llama", "drop its prefix cache now"),),
    ),
    Command(
        "delete", "remove what an ended engine has left",
        "Removes the slots of an engine whose workers are dead, and the limits in them. With --force, a "
        "living engine loses what was set for it: its limit is the device again and its weight 100. Its "
        "floor, its slot and its memory stay: nothing that is in use is ever freed.",
        (_NAME, _option("--force", help="also set back the limit and the weight of a living engine")),
        ("kvctl.deleting", "run_delete"),
        (("kvctl delete llama", "forget a server that was killed"),),
    ),
    Command(
        "watch", "show the list again and again",
        "Shows the list every few seconds until Ctrl-C: in place on a terminal, one after the other "
        "elsewhere. With --json each is one line.",
        (
            _NAMES,
            _option("-n", "--interval", metavar="SECONDS", kind=values.interval, default=2.0,
                    help="how often, at least 0.1 (default 2)"),
            _option("--count", metavar="N", kind=values.whole, help="end after so many"),
            _option("--wide", help="with engine, model and pid of the worker"),
        ),
        ("kvctl.watching", "run_watch"),
        (("kvctl watch -n 1 llama", "one engine, every second"),),
    ),
    Command(
        "kvtop", "the live picture of all devices",
        "Shows each device and each engine on it as bars, live. Keys: q leaves, h helps. See also the "
        "command kvtop, which is the same.",
        (
            _NAMES,
            _option("--refresh", metavar="SECONDS", kind=values.refresh, default=1.0,
                    help="how often, at least 0.25 (default 1)"),
            _option("--once", help="print one picture and leave"),
            _option("--readonly", help="without the keys that change anything"),
        ),
        ("kvctl.top", "run_kvtop"),
        (("kvctl kvtop", "everything"), ("kvctl kvtop --once", "a picture for a report")),
    ),
    Command(
        "history", "show what happened, newest last",
        "Shows the latest events of each device: starts, leases, reclaims, evictions, preemptions, limits, "
        "memory taken by others. Engines that have ended are in it.",
        (_NAMES, _option("-n", "--count", metavar="N", kind=values.whole, default=50, dest="count",
                         help="at most so many events (default 50)")),
        ("kvctl.history", "run_history"),
        (("kvctl history -n 20 llama", "its last 20 events"),),
    ),
    Command(
        "check", "check the invariants of the live ledgers",
        "Holds every ledger against its invariants: nothing is promised twice, no floor is in vain, no rank "
        "is counted twice. Ends with 5 if one does not hold.",
        (), ("kvctl.checking", "run_check"),
        (("kvctl check && echo sound", "in a script"),),
    ),
    Command(
        "doctor", "check this machine and explain its settings",
        "Looks at packages, plugins, driver, host, runtime directory and ledgers, and shows every setting "
        "with its value and where that is from. Ends with 1 if something is wrong.",
        (), ("kvctl.doctor", "run_doctor"),
        (("kvctl doctor", "before you ask for help"),),
    ),
    Command(
        "export", "serve or print metrics for Prometheus",
        "Prints the metrics of all ledgers in Prometheus' text format; with --port it serves them at "
        "/metrics until it is ended. Nothing runs between two scrapes.",
        (
            _option("--port", metavar="PORT", kind=values.port, help="serve there instead; 0: any free one"),
            _option("--bind", metavar="ADDRESS", default="127.0.0.1",
                    help="address to serve at (default 127.0.0.1: this machine only)"),
        ),
        ("kvctl.export", "run_export"),
        (("kvctl export --port 9477", "for Prometheus on this machine"),),
    ),
    Command(
        "completion", "print the completion script of a shell",
        "Prints a script that completes commands, options, and the names of engines that run.",
        (Argument(("shell",), "which shell", "SHELL", choices=("bash", "zsh", "fish")),),
        ("kvctl.completion", "run_completion"),
        (("source <(kvctl completion bash)", "for this bash"),),
    ),
    Command(
        "help", "explain a command",
        "Shows all commands, or all about one.",
        (Argument(("topic",), "the command", "COMMAND", optional=True, completes="command"),),
        ("kvctl.helping", "run_help"),
        (("kvctl help limit", ""),),
    ),
)  # fmt: skip
EXIT_CODES = (
    (0, "done"),
    (1, "failed"),
    (2, "wrong usage"),
    (3, "no such engine"),
    (4, "timed out waiting: what was set stays set"),
    (5, "a ledger is damaged, or an invariant does not hold"),
    (130, "interrupted with Ctrl-C"),
)


def command(name: str) -> Command | None:
    """Return the command of this name, or None."""
    return next((found for found in COMMANDS if found.name == name), None)
