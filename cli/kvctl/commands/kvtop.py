"""`kvctl kvtop`: show devices and engines live, or print them once."""

from __future__ import annotations

import argparse
import sys

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import snapshot
from kvctl.charts import can_draw
from kvctl.devices import choose_devices
from kvctl.exit_codes import CommandError, ExitCode
from kvctl.listing import check_names, device_data, names_in
from kvctl.output import is_terminal, line_width, print_json, render, write

_WIDTH_WITHOUT_TERMINAL = 100


def run_kvtop(arguments: argparse.Namespace) -> ExitCode:
    """Show devices and engines until `q`; with --once print them once, with --json as data."""
    runtime = Runtime.open(arguments.runtime_dir, create=False)
    devices = choose_devices(snapshot(runtime), arguments.device)
    check_names(devices, arguments.names)
    if arguments.json and not arguments.once:
        raise CommandError(ExitCode.USAGE, "kvtop --json needs --once (or use kvctl watch --json)")
    if arguments.json:
        names = names_in(devices, arguments.names)
        print_json({"devices": [device_data(device, names) for device in devices]})
        return ExitCode.OK
    if not arguments.once and not (is_terminal() and sys.stdin is not None and sys.stdin.isatty()):
        raise CommandError(ExitCode.FAILED, "kvtop needs a terminal: use kvtop --once or kvctl watch")
    from kvctl.kvtop.sampling import Sampler
    from kvctl.kvtop.screen import ViewState, screen_lines

    sampler = Sampler(runtime, arguments.device)
    view = ViewState(names=frozenset(arguments.names), refresh_seconds=arguments.refresh,
                ascii_only=not can_draw(), interactive=not arguments.once)  # fmt: skip
    if arguments.once:
        width = line_width() if sys.stdout is not None and sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
        write("".join(render(line, width) for line in screen_lines(sampler.sample(), view, width)))
        return ExitCode.OK
    from kvctl.kvtop.app import TopApp

    app = TopApp(runtime, sampler, view, readonly=arguments.readonly, color=arguments.color)
    app.run()
    if app.ended_by is not None:
        raise SystemExit(128 + app.ended_by)
    return ExitCode.OK
