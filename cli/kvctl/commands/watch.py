"""`kvctl watch`: show the list again and again."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot
from kvctl.devices import choose_devices
from kvctl.exit_codes import ExitCode
from kvctl.listing import check_names, device_data, list_text, names_in
from kvctl.output import console, encodable, is_terminal, print_json, write

if TYPE_CHECKING:
    from rich.live import Live


def run_watch(arguments: argparse.Namespace, sleep: Callable[[float], None] = time.sleep) -> ExitCode:
    """Show the list until Ctrl-C, the usual way to leave, or `--count` times.

    On a terminal the alternate screen shows the list; the last list is printed when the screen is left.
    """
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    check_names(choose_devices(snapshot(runtime), arguments.device), arguments.names)
    live = _alternate_screen() if is_terminal() and not arguments.json else None
    shown, text = 0, ""
    try:
        with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
            while shown != arguments.count:
                if shown:
                    sleep(arguments.interval)
                text = _show(runtime, arguments, live)
                shown += 1
    finally:
        if live is not None:
            write(text)
    return ExitCode.OK


def _alternate_screen() -> Live:
    """Return a display that fills the terminal. A signal that ends the process leaves the display first."""
    from rich.live import Live

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    return Live(
        console=console(interactive=True), screen=True, auto_refresh=False, redirect_stdout=False,
        redirect_stderr=False,
    )  # fmt: skip


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    """Raise SystemExit with the code that a shell gives for the signal."""
    raise SystemExit(128 + number)


def _show(runtime: Runtime, arguments: argparse.Namespace, live: Live | None) -> str:
    """Show the list once, on the alternate screen if there is one, and return its text; with --json none."""
    # Devices and engines come and go: a name or a device that has gone is left out, without an error.
    devices = snapshot(runtime)
    if arguments.device is not None:
        known = [device.uuid for device in devices]
        devices = choose_devices(devices, arguments.device) if known else []
    names = names_in(devices, arguments.names)
    now = time.time()
    if arguments.json:
        data = {"wall_seconds": now, "devices": [device_data(device, names) for device in devices]}
        print_json(data, indent=None)
        text = ""
    else:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        text = f"{stamp}, every {arguments.interval:g} s\n{list_text(devices, names, arguments.wide)}"
        _draw(live, text) if live else write(text + "\n")
    sys.stdout.flush()
    return text


def _draw(live: Live, text: str) -> None:
    from rich.text import Text

    live.update(Text.from_ansi(encodable(text), no_wrap=True, overflow="crop"), refresh=True)
