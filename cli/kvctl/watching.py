"""`kvctl watch`: the list, again and again."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot
from kvctl.codes import Code
from kvctl.devices import choose_devices
from kvctl.listing import check_names, device_data, list_text, names_in
from kvctl.output import is_terminal, print_json, write

# The other screen, without a cursor, and with lines cut where it ends.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def run_watch(arguments: argparse.Namespace, sleep: Callable[[float], None] = time.sleep) -> Code:
    """Show the list until Ctrl-C, which is the way to leave, or so many times."""
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    check_names(choose_devices(snapshot(runtime), arguments.device), arguments.names)
    in_place = is_terminal() and not arguments.json
    shown, frame = 0, ""
    try:
        if in_place:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, _end)
            write(_ENTER)
        while True:
            frame = _show(runtime, arguments, in_place)
            shown += 1
            if shown == arguments.count:
                return Code.OK
            sleep(arguments.interval)
    except KeyboardInterrupt:
        return Code.OK
    finally:
        if in_place:
            write(_LEAVE + frame)


def _end(number: int, _frame: object) -> NoReturn:
    """End as the signal would, but leave the other screen first."""
    raise SystemExit(128 + number)


def _show(runtime: Runtime, arguments: argparse.Namespace, in_place: bool) -> str:
    # Devices and engines come and go: a name or a device that is gone is shown as nothing.
    devices = snapshot(runtime)
    if arguments.device is not None:
        known = [device.uuid for device in devices]
        devices = choose_devices(devices, arguments.device) if known else []
    names = names_in(devices, arguments.names)
    now = time.time()
    if arguments.json:
        data = {"wall_seconds": now, "devices": [device_data(device, names) for device in devices]}
        print_json(data, indent=None)
        frame = ""
    else:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        frame = f"{stamp}, every {arguments.interval:g} s\n{list_text(devices, names, arguments.wide)}"
        write(_in_place(frame) if in_place else frame + "\n")
    sys.stdout.flush()
    return frame


def _in_place(frame: str) -> str:
    lines = frame.splitlines()[: shutil.get_terminal_size().lines - 1]
    return _HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in lines) + _BELOW
