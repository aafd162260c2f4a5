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
    listing.set_defaults(run=("kvctl.listing", "run_list"))

    limit = commands.add_parser("limit", parents=[common], help="limit what each rank of an engine may hold")
    limit.add_argument("name", metavar="NAME")
    limit.add_argument("size", metavar="SIZE", type=_size, help="as 2GiB, 512MiB, 50%% or plain bytes")
    _add_wait(limit)

    percent = commands.add_parser(
        "limit-percent", parents=[common], help="likewise, in percent of the device"
    )
    percent.add_argument("name", metavar="NAME")
    percent.add_argument("size", metavar="PCT", type=_percent, help="0 to 100")
    _add_wait(percent)

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


def _add_wait(command: argparse.ArgumentParser) -> None:
    command.add_argument("--wait", metavar="SECONDS", type=_seconds, default=5.0,
                         help="how long to wait until it holds (default 5)")  # fmt: skip
    command.add_argument("--no-wait", action="store_true", help="set it and return at once")
    command.set_defaults(run=("kvctl.limit", "run_limit"))


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


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 86400 seconds")
    return seconds
