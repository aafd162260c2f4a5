"""The command line of kvctl."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kvcached_core import __version__
from kvcached_core.errors import KVCachedError
from kvcached_core.units import Size, parse_size
from kvctl.codes import Code, Failure
from kvctl.output import say

_MOST = 1_000_000  # of weights and of events
_EXIT_CODES = """exit codes:
  0 done   1 failed   2 wrong usage   3 no such engine   4 timed out waiting   5 a ledger is damaged"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; wrong usage raises SystemExit(2), as argparse does."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    module, function = arguments.run
    try:
        code = getattr(import_module(module), function)(arguments)  # what a command needs is imported now
        sys.stdout.flush()
    except Failure as failure:
        say(str(failure))
        code = failure.code
    except KVCachedError as error:
        say(f"{error} (kvctl doctor tells more)")
        code = Code.FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Code.OK)
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvctl", description="See and steer the elastic KV caches of a machine.", epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"kvctl {__version__}")
    common = _common()
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", parents=[common], help="show engines and what they hold")
    listing.add_argument("names", nargs="*", metavar="NAME", help="only these engines")
    listing.add_argument("--wide", action="store_true", help="with engine, model and pid of the worker")
    listing.set_defaults(run=("kvctl.listing", "run_list"))

    _add_controls(commands, common)

    history = commands.add_parser("history", parents=[common], help="show what happened, newest last")
    history.add_argument("names", nargs="*", metavar="NAME", help="only these engines")
    history.add_argument(
        "-n", metavar="N", dest="count", type=_whole, default=50, help="at most so many events (default 50)"
    )
    history.set_defaults(run=("kvctl.history", "run_history"))

    doctor = commands.add_parser(
        "doctor", parents=[common], help="check this machine and explain its settings"
    )
    doctor.set_defaults(run=("kvctl.doctor", "run_doctor"))
    return parser


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    common.add_argument(
        "--runtime-dir", metavar="DIR", help="where the ledgers are; default: KVCACHED_RUNTIME_DIR"
    )
    common.add_argument(
        "--device", metavar="DEVICE", help="a UUID, the beginning of one, or a place in the list"
    )
    return common


def _add_controls(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    size = "as 2GiB, 512MiB, 50%% or plain bytes"
    for name, metavar, kind, about, value in (
        ("limit", "SIZE", _size, "limit what each rank of an engine may hold", size),
        ("limit-percent", "PCT", _percent, "likewise, in percent of the device", "0 to 100"),
        ("floor", "SIZE", _size, "set what each rank of an engine can always get back", size),
        (
            "weight",
            "N",
            _whole,
            "set its share when there is not enough for all",
            f"1 to {_MOST}; 100 if never set",
        ),
    ):
        command = commands.add_parser(name, parents=[common], help=about)
        command.add_argument("name", metavar="NAME")
        command.add_argument("value", metavar=metavar, type=kind, help=value)
        command.add_argument("--wait", metavar="SECONDS", type=_seconds, default=5.0,
                             help="how long to wait until it holds (default 5)")  # fmt: skip
        command.add_argument("--no-wait", action="store_true", help="set it and return at once")
        command.set_defaults(run=("kvctl.controls", "run_" + name.removesuffix("-percent")))


def _size(text: str) -> Size:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _percent(text: str) -> Size:
    try:
        return parse_size(text.removesuffix("%") + "%")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 100") from None


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to {_MOST}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 86400 seconds")
    return seconds
