"""Find the devices that `--device` names."""

from __future__ import annotations

from collections.abc import Sequence

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, snapshot
from kvctl.exit_codes import CommandError, ExitCode


def choose_devices(devices: Sequence[DeviceSnapshot], wanted: str | None) -> list[DeviceSnapshot]:
    """Return all devices, or the device with this UUID, prefix of a UUID, or number in `kvctl list`.

    Raises CommandError if no device matches, or if several do.
    """
    if wanted is None:
        return list(devices)
    exact = [device for device in devices if device.uuid == wanted]
    if exact:
        return exact
    if wanted.isdecimal() and int(wanted) < len(devices):
        return [devices[int(wanted)]]
    found = [device for device in devices if device.uuid.startswith(wanted)]
    if len(found) == 1:
        return found
    known = ", ".join(f"{i}: {device.uuid}" for i, device in enumerate(devices)) or "no device has a ledger"
    problem = "names several devices" if found else "names no device"
    raise CommandError(ExitCode.USAGE, f"--device {wanted} {problem}. Known devices: {known}")


def chosen_uuids(runtime: Runtime, wanted: str | None) -> list[str] | None:
    """Return the UUID that `--device` names, in a list; None means all devices. Raises CommandError."""
    return None if wanted is None else [device.uuid for device in choose_devices(snapshot(runtime), wanted)]
