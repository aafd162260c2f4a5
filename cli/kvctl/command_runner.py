"""Run one parsed command and turn its errors into a message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kvcached_core.errors import KVCachedError
from kvctl.exit_codes import INTERRUPTED, CommandError, ExitCode
from kvctl.output import choose_color, say


def run_command(words: Sequence[str]) -> int:
    """Parse and run one command; return its exit code. Raises SystemExit for wrong usage and --help."""
    from kvctl.parser import parse

    return run_parsed(parse(words))


def run_parsed(arguments: argparse.Namespace) -> int:
    """Run the command that `arguments` names and return its exit code."""
    choose_color(arguments.color)
    module, function = arguments.run
    try:
        code = getattr(import_module(module), function)(arguments)  # imports only this command's needs
        if sys.stdout is not None:
            sys.stdout.flush()
    except CommandError as error:
        say(str(error))
        code = error.code
    except KVCachedError as error:
        say(f"{error} (kvctl doctor tells more)")
        code = ExitCode.FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed its end, as `head` does
        _discard_buffered_output()
        return int(ExitCode.OK)
    except OSError as error:
        say(f"{error.filename or 'output'}: {error.strerror or error}")
        _discard_buffered_output()
        code = ExitCode.FAILED
    return int(code)


def _discard_buffered_output() -> None:
    """Point stdout at /dev/null if it cannot be flushed. Python would otherwise fail while it exits."""
    try:
        sys.stdout.flush()
        return
    except OSError:
        pass
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())
