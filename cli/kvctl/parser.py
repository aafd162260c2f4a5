"""The argument parser, made from the command definitions, with its error messages."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from kvcached_core import __version__
from kvctl.command_definitions import COMMANDS, COMMON, EXIT_CODES, Argument, Command
from kvctl.exit_codes import ExitCode
from kvctl.output import say


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence that also names the help."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with the code for wrong usage."""
        usage_error(message, self.prog)


def usage_error(message: str, program: str = "kvctl") -> NoReturn:
    """Print the message and how to get help. Raises SystemExit."""
    say(f"{message} (see {program} --help)")
    raise SystemExit(int(ExitCode.USAGE))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; the result also has the command's `run` and `command`. Raises SystemExit."""
    name = argv[0] if argv else ""
    known = [command.name for command in COMMANDS]
    if name and not name.startswith("-") and name not in known:
        say(unknown_command(name, known))
        raise SystemExit(int(ExitCode.USAGE))
    if name.startswith("-") and name not in ("-h", "--help", "--version"):
        usage_error(f"{name}: the command comes first, then its options")
    chosen = [command for command in COMMANDS if command.name == name]
    arguments, rest = build(chosen or COMMANDS).parse_known_args(argv)
    if rest:
        _reject_rest(rest, chosen[0])
    return arguments


def unknown_command(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown command, with the most similar command or all commands."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "the commands are: " + ", ".join(known)
    return f"no command is named {name!r}: {hint} (see kvctl help)"


def _reject_rest(rest: Sequence[str], command: Command) -> NoReturn:
    flags = [flag for argument in (*command.arguments, *COMMON) for flag in argument.names if flag[0] == "-"]
    first = rest[0]
    if first.startswith("-"):
        near = difflib.get_close_matches(first.split("=")[0], flags, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]}?" if near else ""
        usage_error(f"{command.name} has no option {first}{hint}", f"kvctl {command.name}")
    usage_error(f"{command.name} has too many arguments: {' '.join(rest)!r}", f"kvctl {command.name}")


def build(commands: Iterable[Command] = COMMANDS) -> Parser:
    """Return a parser for these commands."""
    codes = "\n".join(f"  {code:<4} {text}" for code, text in EXIT_CODES)
    parser = Parser(
        prog="kvctl",
        description="Show and control the elastic KV caches of this machine. kvctl alone opens a shell.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvctl {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    for command in commands:
        add_arguments(subparsers.add_parser(command.name, help=command.summary, **_texts(command)), command)
    return parser


def build_one(command: Command, program: str) -> Parser:
    """Return a parser for one command, as a program of its own."""
    parser = Parser(prog=program, **_texts(command))
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    add_arguments(parser, command)
    return parser


def _texts(command: Command) -> dict[str, Any]:
    width = max(len(line) for line, _ in command.examples)
    lines = (f"  {line:<{width}}  {text}".rstrip() for line, text in command.examples)
    return {
        "description": command.description,
        "epilog": "examples:\n" + "\n".join(lines),
        "formatter_class": _Formatter,
        "allow_abbrev": False,
    }


class _Formatter(argparse.HelpFormatter):
    """Wraps descriptions and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return super()._fill_text(text, width, indent)


def add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add the command's arguments and the options of all commands."""
    for argument in (*command.arguments, *COMMON):
        _add(parser, argument)
    parser.set_defaults(run=command.run, command=command.name)


def _add(parser: argparse.ArgumentParser, argument: Argument) -> None:
    options: dict[str, Any] = {"help": argument.help.replace("%", "%%")}
    if argument.is_switch:
        parser.add_argument(*argument.names, action="store_true", **options)
        return
    options |= {"metavar": argument.metavar, "default": argument.default}
    if argument.parse is not None:
        options["type"] = argument.parse
    if argument.choices:
        options["choices"] = argument.choices
        del options["metavar"]
    if argument.many or argument.optional:
        options["nargs"] = "*" if argument.many else "?"
    if argument.dest is not None:
        options["dest"] = argument.dest
    parser.add_argument(*argument.names, **options)
