"""The shell: `kvctl` without a command."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvctl.command_definitions import COMMANDS
from kvctl.completion import candidates, known_devices, running_engines
from kvctl.exit_codes import INTERRUPTED, ExitCode
from kvctl.output import say

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT = "kvcached> "
_LEAVE = ("exit", "quit")

_WELCOME = "Type help for the commands, exit or Ctrl-D to leave; !COMMAND runs COMMAND in your own shell."
_ONLY_HERE = """
in this shell also:
    !COMMAND     run COMMAND in your own shell
    exit, quit   leave (or Ctrl-D)
"""


def run_shell() -> int:
    """Read lines until the end of input; returns the exit code of the last one.

    On a terminal with a prompt, history and completion, elsewhere line by line without them.
    """
    if sys.stdin is None:
        return int(ExitCode.OK)
    if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty():
        print(_WELCOME)
        return _obey_all(_prompted(make_session()), goes_on=True)
    return _obey_all(iter(sys.stdin.readline, ""), goes_on=False)


def _obey_all(lines: Iterator[str], goes_on: bool) -> int:
    """Carry out lines up to the one that leaves; Ctrl-C between two of them ends it unless it `goes_on`."""
    code = int(ExitCode.OK)
    while True:
        try:
            line = next(lines, "exit").strip()
            if line in _LEAVE:
                return code
            if line and not line.startswith("#"):
                code = obey(line)
        except KeyboardInterrupt:
            if not goes_on:
                return INTERRUPTED


def obey(line: str) -> int:
    """Carry out one line and return its exit code; what is no command is never run."""
    if line.startswith("!"):
        return _run_outside(line[1:].strip())
    try:
        words = shlex.split(line)
    except ValueError as error:
        say(f"{line}: {str(error).lower()}")
        return int(ExitCode.USAGE)
    known = [*(command.name for command in COMMANDS), *_LEAVE]
    if words and words[0] in _LEAVE:
        say(f"{words[0]} takes no arguments")
        return int(ExitCode.USAGE)
    if words and words[0] not in known:
        say(_unknown(words[0], known))
        return int(ExitCode.USAGE)
    return _run_command(words)


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "help shows those there are."
    return f"no command is named {name!r}: {hint} A command of your own shell begins with !"


def _run_command(words: list[str]) -> int:
    from kvctl.command_runner import run_command

    try:
        code = run_command(words)
    except SystemExit as stop:  # help, or wrong usage
        code = stop.code if isinstance(stop.code, int) else int(ExitCode.OK)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if words == ["help"]:
        sys.stdout.write(_ONLY_HERE)
    sys.stdout.flush()
    return code


def _run_outside(command: str) -> int:
    if not command:
        say("! runs a command of your own shell: !nvidia-smi")
        return int(ExitCode.USAGE)
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        code = subprocess.run(command, shell=True, check=False).returncode
        return 128 - code if code < 0 else code
    return INTERRUPTED


def history_path(environ: dict[str, str] | None = None) -> Path:
    """Return where the lines typed are kept; makes the folder, private."""
    environ = dict(os.environ) if environ is None else environ
    home = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME') or '.'}/.local/state"
    path = Path(home) / "kvctl" / "history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


def make_session(**more: Any) -> PromptSession[str]:
    """Return a prompt with history and completion; a history that cannot be written is kept in memory."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class LineCompleter(Completer):
        """Completes commands, options and names."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            """Return what the word before the cursor may become."""
            begun = document.get_word_before_cursor(WORD=True)
            for word in suggestions(document.text_before_cursor):
                yield Completion(word, start_position=-len(begun))

    history: History
    try:
        history = FileHistory(str(history_path()))
    except OSError as error:
        say(f"the history is not kept: {error.strerror}")
        history = InMemoryHistory()
    return PromptSession(
        PROMPT, history=history, completer=LineCompleter(), auto_suggest=AutoSuggestFromHistory(),
        complete_while_typing=False, **more,
    )  # fmt: skip


def suggestions(text: str, engines: Callable[[], list[str]] = running_engines,
                devices: Callable[[], list[str]] = known_devices) -> list[str]:  # fmt: skip
    """Return what the last word of a line may become."""
    words = text.split()
    if not words or text[-1].isspace():
        words.append("")
    if words[0].startswith("!"):
        return []
    found = candidates(words, engines, devices)
    return sorted([*found, *(w for w in _LEAVE if w.startswith(words[0]))]) if len(words) == 1 else found


def _prompted(session: PromptSession[str]) -> Iterator[str]:
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
