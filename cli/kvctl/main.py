"""The command line of kvctl."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kvcached_core.errors import KVCachedError
from kvctl.codes import Code, Failure
from kvctl.output import choose_color, say

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or the shell if there is none, and return the exit code.

    Wrong usage raises SystemExit(2), as argparse does.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        from kvctl.shell import run_shell

        return run_shell()
    if words[:2] == ["--complete", "--"]:  # the scripts of `kvctl completion` ask
        from kvctl.completion import complete

        return complete(words[2:])
    return run_command(words)


def kvtop(argv: Sequence[str] | None = None) -> int:
    """Run the program kvtop, which is `kvctl kvtop`."""
    from kvctl.parser import build_one
    from kvctl.spec import command

    found = command("kvtop")
    assert found is not None
    return _carry_out(build_one(found, "kvtop").parse_args(argv))


def run_command(words: Sequence[str]) -> int:
    """Run one command and return its exit code; wrong usage raises SystemExit."""
    from kvctl.parser import parse

    return _carry_out(parse(words))


def _carry_out(arguments: argparse.Namespace) -> int:
    choose_color(arguments.color)
    module, function = arguments.run
    try:
        code = getattr(import_module(module), function)(arguments)  # what a command needs is imported now
        if sys.stdout is not None:
            sys.stdout.flush()
    except Failure as failure:
        say(str(failure))
        code = failure.code
    except KVCachedError as error:
        say(f"{error} (kvctl doctor tells more)")
        code = Code.FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        return int(Code.OK)
    except OSError as error:
        say(f"{error.filename or 'output'}: {error.strerror or error}")
        _drop_output()
        code = Code.FAILED
    return int(code)


def _drop_output() -> None:
    """Let what stdout buffers go nowhere if it cannot be written: else the end of the process would fail."""
    try:
        sys.stdout.flush()
        return
    except OSError:
        pass
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
