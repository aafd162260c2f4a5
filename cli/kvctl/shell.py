"""The shell that `kvctl` without a command opens."""

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

_WELCOME = "Type help for the commands, exit or Ctrl-D to leave. !COMMAND runs COMMAND in your own shell."
_SHELL_ONLY_HELP = """
only in this shell:
    !COMMAND     run COMMAND in your own shell
    exit, quit   leave (or Ctrl-D)
"""


def run_shell() -> int:
    """Run the commands on stdin until it ends, and return the exit code of the last one.

    A terminal gets a prompt, history and completion.
    """
    if sys.stdin is None:
        return int(ExitCode.OK)
    if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty():
        print(_WELCOME)
        return _run_all(_prompted(make_session()), survives_interrupt=True)
    return _run_all(iter(sys.stdin.readline, ""), survives_interrupt=False)


def _run_all(lines: Iterator[str], survives_interrupt: bool) -> int:
    """Run lines until one leaves the shell, and return the last exit code. Ctrl-C at a prompt may end it."""
    code = int(ExitCode.OK)
    while True:
        try:
            line = next(lines, "exit").strip()
            if line in _LEAVE:
                return code
            if line and not line.startswith("#"):
                code = run_line(line)
        except KeyboardInterrupt:
            if not survives_interrupt:
                return INTERRUPTED


def run_line(line: str) -> int:
    """Run one line and return its exit code. Only a line that begins with ! reaches the user's shell."""
    if line.startswith("!"):
        return _run_in_user_shell(line[1:].strip())
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
    hint = f"did you mean {near[0]!r}?" if near else "help shows all commands."
    return f"no command is named {name!r}: {hint} Put ! before a command of your own shell"


def _run_command(words: list[str]) -> int:
    from kvctl.command_runner import run_command

    try:
        code = run_command(words)
    except SystemExit as stop:  # help, or wrong usage
        code = stop.code if isinstance(stop.code, int) else int(ExitCode.OK)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if words == ["help"]:
        sys.stdout.write(_SHELL_ONLY_HELP)
    sys.stdout.flush()
    return code


def _run_in_user_shell(command: str) -> int:
    if not command:
        say("! needs a command of your own shell, for example !nvidia-smi")
        return int(ExitCode.USAGE)
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        code = subprocess.run(command, shell=True, check=False).returncode
        return 128 - code if code < 0 else code
    return INTERRUPTED


def history_path(environ: dict[str, str] | None = None) -> Path:
    """Return the file that keeps typed lines. Only the user may read the file and its folder."""
    environ = dict(os.environ) if environ is None else environ
    home = environ.get("XDG_STATE_HOME") or f"{environ.get('HOME') or '.'}/.local/state"
    path = Path(home) / "kvctl" / "history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


def make_session(**more: Any) -> PromptSession[str]:
    """Return a prompt with history and completion. A history that cannot be saved is kept in memory."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class LineCompleter(Completer):
        """Completes commands, options and names of engines."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            """Yield the words that complete the word before the cursor."""
            prefix = document.get_word_before_cursor(WORD=True)
            for word in suggestions(document.text_before_cursor):
                yield Completion(word, start_position=-len(prefix))

    history: History
    try:
        history = FileHistory(str(history_path()))
    except OSError as error:
        say(f"the history of this session is not saved: {error.strerror}")
        history = InMemoryHistory()
    return PromptSession(
        PROMPT, history=history, completer=LineCompleter(), auto_suggest=AutoSuggestFromHistory(),
        complete_while_typing=False, **more,
    )  # fmt: skip


def suggestions(text: str, engines: Callable[[], list[str]] = running_engines,
                devices: Callable[[], list[str]] = known_devices) -> list[str]:  # fmt: skip
    """Return the words that complete the last word of a line."""
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
