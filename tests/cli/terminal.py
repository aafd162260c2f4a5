"""Run a command in a real terminal: tmux."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from kvcached_core.ledger import Runtime
from tests.cli.process import environment, until
from tests.programs import program

_KEPT = ("PATH", "PYTHONPATH", "KVCACHED_RUNTIME_DIR", "LANG")


class Terminal:
    """A tmux session that runs a command; its size is in cells."""

    count = 0

    def __init__(self, command: str, environ: dict[str, str], columns: int, lines: int) -> None:
        Terminal.count += 1
        self._tmux = [program("tmux"), "-L", f"kvctl-test-{os.getpid()}-{Terminal.count}", "-f", "/dev/null"]
        options = ["new-session", "-d", "-x", str(columns), "-y", str(lines)]
        # The tmux server passes its environment on: nothing of this process, such as COLUMNS, may be in it.
        subprocess.run([*self._tmux, *options, command], env=environ, check=True, timeout=60)

    def type(self, *keys: str) -> None:
        """Press keys, named as in tmux."""
        subprocess.run([*self._tmux, "send-keys", *keys], check=True, timeout=60)

    def screen(self, colours: bool = False) -> str:
        """Return the text on the screen; empty after the command has ended."""
        command = [*self._tmux, "capture-pane", "-p", *(["-e"] if colours else [])]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout

    def has_other_screen(self) -> bool:
        """Return whether the alternate screen is shown."""
        command = [*self._tmux, "display-message", "-p", "#{alternate_on}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "1"

    def resize(self, columns: int, lines: int) -> None:
        """Resize the terminal."""
        size = ["resize-window", "-x", str(columns), "-y", str(lines)]
        subprocess.run([*self._tmux, *size], check=True, timeout=60)

    def ended(self) -> bool:
        """Return whether the command has ended."""
        return subprocess.run([*self._tmux, "has-session"], capture_output=True, check=False).returncode != 0

    def close(self) -> None:
        """End the session."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)

    def wait_for(self, *texts: str) -> str:
        """Wait until all texts are on the screen, and return the screen."""
        seen = ""

        def there() -> bool:
            nonlocal seen
            seen = self.screen()
            return all(text in seen for text in texts)

        until(there, lambda: f"{texts} on the screen:\n{seen}")
        return seen


@contextlib.contextmanager
def terminal(
    command: str, runtime: Runtime, columns: int = 80, lines: int = 24, **more: str
) -> Iterator[Terminal]:
    """Run a command in a terminal during the block."""
    environ = {name: value for name, value in environment(runtime).items() if name in _KEPT}
    opened = Terminal(command, environ | {"LC_ALL": "C.UTF-8"} | more, columns, lines)
    try:
        yield opened
    finally:
        opened.close()
