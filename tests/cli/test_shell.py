"""The shell: the output of a session, wrong lines, completion, and the permissions of its history."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from kvcached_core.ledger import Runtime
from kvctl import shell
from tests.cli.process import kvctl, until
from tests.cli.terminal import Terminal, terminal
from tests.ledger.helpers import attach

pytestmark = pytest.mark.alone

SESSION = """
# a comment, and an empty line

list
weight llama 250 --no-wait
!echo outside; exit 3
limt llama 1G
ls /
!
list 'unfinished
exit now
quit
list --json
"""


def test_a_session_prints_the_expected_lines(runtime: Runtime) -> None:
    attach(runtime, "a", name="llama")
    done = kvctl(runtime=runtime, stdin=SESSION)
    out = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert out[0].startswith("0: host capacity 64 MiB") and out[3].startswith("llama 0 0 0")
    assert out[4:] == [
        "RANK DEVICE WEIGHT STATE",
        "0 host 250 not acknowledged",
        "outside",
    ], "nothing after quit"
    assert done.stderr.splitlines() == [
        "kvctl: no command is named 'limt': did you mean 'limit'? Put ! before a command of your own shell",
        "kvctl: no command is named 'ls': did you mean 'list'? Put ! before a command of your own shell",
        "kvctl: ! needs a command of your own shell, for example !nvidia-smi",
        "kvctl: list 'unfinished: no closing quotation",
        "kvctl: exit takes no arguments",
    ]
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("lines", "code"),
    [("", 0), ("exit\n", 0), ("list\n", 0), ("list nobody\n", 3), ("!exit 7\n", 7), ("!kill -TERM $$\n", 143),
     ("list nobody\nlist\n", 0), ("lst\n", 2), ("limit\n", 2), ("help\n", 0), ("help limit\n", 0)],
)  # fmt: skip
def test_the_exit_code_of_the_shell_is_that_of_the_last_line(runtime: Runtime, lines: str, code: int) -> None:
    assert kvctl(runtime=runtime, stdin=lines).returncode == code


def test_help_in_the_shell_also_explains_its_own_commands(runtime: Runtime) -> None:
    out = kvctl(runtime=runtime, stdin="help\n").stdout
    assert "!COMMAND" in out and "exit, quit" in out and "limit-percent" in out
    assert "!COMMAND" not in kvctl("help", runtime=runtime).stdout


def test_only_lines_with_an_exclamation_mark_reach_the_users_shell(runtime: Runtime, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for line in (
        f"touch {witness}",
        f"list; touch {witness}",
        f"list $(touch {witness})",
        f"`touch {witness}`",
    ):
        assert kvctl(runtime=runtime, stdin=f"{line}\n").returncode != 0
    assert not witness.exists()
    assert kvctl(runtime=runtime, stdin=f"!touch {witness}\n").returncode == 0 and witness.exists()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("li", ["limit", "limit-percent", "list"]),
        ("e", ["exit", "export"]),
        ("limit ", ["llama", "qwen"]),
        ("limit q", ["qwen"]),
        ("limit qwen ", []),
        ("limit qwen 1G --no", ["--no-wait"]),
        ("list llama ", ["qwen"]),
        ("list --device ", ["GPU-1", "host"]),
        ("limit --device host l", ["llama"]),
        ("watch --color ", ["always", "auto", "never"]),
        ("help w", ["watch", "weight"]),
        ("completion ", ["bash", "fish", "zsh"]),
        ("doctor ", []),
        ("nothing ", []),
        ("!li", []),
    ],
)
def test_completion(line: str, found: list[str]) -> None:
    there = shell.suggestions(line, lambda: ["llama", "qwen"], lambda: ["GPU-1", "host"])
    assert there == found


def test_the_prompt_completes_and_its_history_is_private(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(runtime, "a", name="llama")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = shell.history_path()
    path.chmod(0o644)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        session = shell.make_session()
        pipe.send_text("list llama\n")
        assert session.prompt() == "list llama"
        assert session.message == "kvcached> " == shell.PROMPT
        completer = session.completer
        assert completer is not None
        words = [each.text for each in completer.get_completions(Document("limit ll"), None)]  # type: ignore[arg-type]
        assert words == ["llama"]
        pipe.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            session.prompt()
        pipe.send_text("\x04")
        with pytest.raises(EOFError):
            session.prompt()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "list llama" in path.read_text()


def test_a_history_that_cannot_be_saved_is_reported_and_does_not_end_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("list\n")
        assert shell.make_session().prompt() == "list"
    assert "the history of this session is not saved" in capsys.readouterr().err


def prompts(screen: Terminal) -> None:
    """Wait until the shell shows a prompt."""
    until(lambda: screen.screen().rstrip().endswith("kvcached>"), "a prompt")


def test_the_shell_in_a_terminal(runtime: Runtime, tmp_path: Path) -> None:
    attach(runtime, "a", name="llama")
    with terminal(f"{sys.executable} -m kvctl", runtime, HOME=str(tmp_path)) as screen:
        screen.wait_for(shell.PROMPT.strip())
        screen.type("lis", "Tab")
        screen.wait_for("kvcached> list")
        screen.type(" lla", "Tab")
        screen.wait_for("kvcached> list llama")
        screen.type("Enter")
        screen.wait_for("0: host", "running")
        screen.type("kvtop --once", "Enter")
        screen.wait_for("Memory Usage")
        screen.type("watch -n 0.1", "Enter")
        screen.wait_for("every 0.1 s")
        screen.type("C-c")
        prompts(screen)
        screen.type("!echo $((40 + 2))", "Enter")
        screen.wait_for("\n42")
        prompts(screen)
        screen.type("not this", "C-c")
        screen.wait_for("kvcached> not this")
        prompts(screen)
        screen.type("C-d")
        until(screen.ended, "Ctrl-D leaves")
    assert "watch -n 0.1" in (tmp_path / ".local/state/kvctl/history").read_text()
