"""`kvctl help`: show all commands, or the help of one."""

from __future__ import annotations

import argparse

from kvctl.command_definitions import COMMANDS, command
from kvctl.exit_codes import CommandError, ExitCode
from kvctl.output import print_json, write
from kvctl.parser import build, build_one, unknown_command


def run_help(arguments: argparse.Namespace) -> ExitCode:
    """Print the help of kvctl, or of one command."""
    topic: str | None = arguments.topic
    if topic is None:
        text = build().format_help()
    elif found := command(topic):
        text = build_one(found, f"kvctl {topic}").format_help()
    else:
        raise CommandError(ExitCode.USAGE, unknown_command(topic, [command.name for command in COMMANDS]))
    if arguments.json:
        print_json({"topic": topic, "help": text})
    else:
        write(text)
    return ExitCode.OK
