"""The entry points of the programs kvctl and kvtop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvctl.command_runner import run_command, run_parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, or the shell if none is given, and return the exit code.

    Raises SystemExit(2) for wrong usage, as argparse does.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        from kvctl.shell import run_shell

        return run_shell()
    if words[:2] == ["--complete", "--"]:  # called by the scripts that `kvctl completion` prints
        from kvctl.completion import complete

        return complete(words[2:])
    return run_command(words)


def kvtop(argv: Sequence[str] | None = None) -> int:
    """Run the program kvtop, which is the same as `kvctl kvtop`."""
    from kvctl.command_definitions import command
    from kvctl.parser import build_one

    definition = command("kvtop")
    assert definition is not None
    return run_parsed(build_one(definition, "kvtop").parse_args(argv))
