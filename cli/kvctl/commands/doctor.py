"""`kvctl doctor`: find problems on this machine and show all settings."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterable, Iterator, Mapping

from kvcached_core import config
from kvcached_core.errors import ConfigError, LedgerError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.invariants import check
from kvcached_core.ledger.snapshot import DeviceSnapshot, snapshot
from kvcached_core.units import format_size
from kvctl.devices import choose_devices
from kvctl.exit_codes import ExitCode
from kvctl.listing import state
from kvctl.machine_checks import (
    Finding,
    check_cuda,
    check_host,
    check_mps,
    check_packages,
    processes_with_open_files,
)
from kvctl.output import print_json, print_table


def run_doctor(arguments: argparse.Namespace) -> ExitCode:
    """Print every finding and every setting. Exits with FAILED or INTEGRITY if a finding is an error."""
    findings = [*check_packages(), *check_cuda(), *check_mps(), *check_host()]
    settings, setting_errors = _settings(os.environ)
    ledger_findings, damaged = _check_runtime(arguments)
    findings += [*ledger_findings, *setting_errors]
    if arguments.json:
        data = [finding._asdict() for finding in findings]
        print_json({"checks": data, "settings": [setting._asdict() for setting in settings]})
    else:
        print_table(("SUBJECT", "STATUS", "FINDING"), findings)
        print()
        rows = [(s.name, s.variable, s.value, s.source) for s in settings]
        print_table(("SETTING", "VARIABLE", "VALUE", "FROM"), rows)
    if damaged:
        return ExitCode.INTEGRITY
    return ExitCode.FAILED if any(finding.status == "error" for finding in findings) else ExitCode.OK


def _settings(environ: Mapping[str, str]) -> tuple[list[config.Setting], list[Finding]]:
    """Return every setting, and an error if a value is not legal; then the settings are the defaults."""
    switch = environ.get(config.SWITCH_VARIABLE, "")
    source = config.SWITCH_VARIABLE if switch else "default"
    settings = [config.Setting("enabled", config.SWITCH_VARIABLE, switch or "0", source)]
    try:
        config.enabled(environ)
        return settings + config.explain(environ), []
    except ConfigError as error:
        return settings + config.explain({}), [Finding("settings", "error", str(error))]


def _check_runtime(arguments: argparse.Namespace) -> tuple[list[Finding], bool]:
    """Check the runtime directory and its ledgers; also return whether a ledger is damaged."""
    try:
        runtime = Runtime.open(arguments.runtime_dir, create=False)
        devices = snapshot(runtime)
    except LedgerError as error:
        return [Finding("ledger", "error", str(error))], False
    chosen = choose_devices(devices, arguments.device)
    broken = [sentence for device in chosen for sentence in check(device)]
    findings = [*_check_folder(runtime), *_check_owners(chosen), *_check_open_files(runtime, chosen)]
    findings += [Finding("ledger", "error", sentence) for sentence in broken]
    return findings, bool(broken)


def _check_folder(runtime: Runtime) -> Iterator[Finding]:
    try:
        status = runtime.path.stat()
    except FileNotFoundError:
        yield Finding("ledger", "info", f"{runtime.path} does not exist yet: no engine has run with it")
        return
    mode = stat.S_IMODE(status.st_mode)
    shared = ", shared with a group" if runtime.shared else ""
    yield Finding("ledger", "ok", f"{runtime.path} has mode {mode:04o}, owner {status.st_uid}{shared}")
    if not os.access(runtime.path, os.W_OK | os.X_OK):
        yield Finding("ledger", "error", f"user {os.getuid()} cannot write to {runtime.path}")


def _check_owners(devices: Iterable[DeviceSnapshot]) -> Iterator[Finding]:
    for device in devices:
        sizes = (device.leased_bytes, device.capacity_bytes, device.headroom_bytes)
        leased, capacity, headroom = map(format_size, sizes)
        text = f"{device.uuid}: {leased} leased of {capacity}, headroom {headroom}"
        yield Finding("ledger", "info", text)
        for owner in device.owners:
            rank = f"{device.uuid}: {owner.name} rank {owner.rank}, slot {owner.slot}, {state(owner)}"
            if owner.live:
                yield Finding("ledger", "ok", f"{rank}, worker {owner.worker_pid}")
            else:
                yield Finding(
                    "ledger",
                    "warning",
                    f"{rank}: removed at the next engine start or kvctl limit on its device",
                )


def _check_open_files(runtime: Runtime, devices: Iterable[DeviceSnapshot]) -> Iterator[Finding]:
    for device in devices:
        if found := processes_with_open_files((runtime.path / device.folder).resolve()):
            text = f"{device.uuid}: its ledger is open in {', '.join(found)}"
            yield Finding("ledger", "info", text)
