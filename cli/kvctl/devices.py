"""Which devices a command is about."""

from __future__ import annotations

from collections.abc import Sequence

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, snapshot
from kvctl.exit_codes import CommandError, ExitCode


def choose_devices(devices: Sequence[DeviceSnapshot], wanted: str | None) -> list[DeviceSnapshot]:
    """Return all devices, or the one named by UUID, by a prefix of it or by its place in the list.

    Raises CommandError if there is none such or more than one.
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
    known = ", ".join(f"{i}: {device.uuid}" for i, device in enumerate(devices)) or "none has a ledger"
    what = "names several devices" if found else "names no device"
    raise CommandError(ExitCode.USAGE, f"--device {wanted} {what}. Known are: {known}")


def chosen_uuids(runtime: Runtime, wanted: str | None) -> list[str] | None:
    """Return the UUIDs of the devices that a command is about, None for all. Raises CommandError likewise."""
    return None if wanted is None else [device.uuid for device in choose_devices(snapshot(runtime), wanted)]
