"""Read the ledger from outside while engines work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcached_core.ledger import DeviceSnapshot, OwnerSnapshot, Runtime, check, snapshot

_SAMPLE_SECONDS = 0.02


def owners(runtime: Path, name: str = "") -> list[OwnerSnapshot]:
    """Return the ledger's living owners: all, or only those named `name`."""
    found = [owner for device in snapshot(Runtime.open(runtime)) for owner in device.owners if owner.live]
    return [owner for owner in found if name in ("", owner.name)]


def owner(runtime: Path, name: str) -> OwnerSnapshot:
    """Return the living owner named `name`, which must be the only one."""
    (found,) = owners(runtime, name)
    return found


def is_at_rest(runtime: Path, name: str) -> bool:
    """Return whether an engine holds its null granule and nothing else."""
    now = owner(runtime, name)
    return now.ready_bytes == now.mapped_bytes == now.leased_bytes == now.granule_bytes


class Watch:
    """Violations and peaks found in a series of snapshots of the ledger."""

    def __init__(self) -> None:
        self.samples = 0
        self.violations: list[str] = []
        self.peak_ready_bytes: dict[str, int] = {}
        self.peak_used_bytes: dict[str, int] = {}
        self.peak_demand_bytes: dict[str, int] = {}

    def take(self, device: DeviceSnapshot) -> None:
        """Check one snapshot and add its findings."""
        self.samples += 1
        self.violations += check(device)
        if device.settled and device.ready_bytes > device.capacity_bytes - device.headroom_bytes:
            self.violations.append(f"{device.ready_bytes} bytes are ready of {device.capacity_bytes}")
        for each in device.owners:
            for peaks, size_bytes in (
                (self.peak_ready_bytes, each.ready_bytes),
                (self.peak_used_bytes, each.used_bytes),
                (self.peak_demand_bytes, each.demand_bytes),
            ):
                peaks[each.name] = max(peaks.get(each.name, 0), size_bytes)


@contextmanager
def watching(runtime: Path) -> Iterator[Watch]:
    """Check the ledger 50 times a second while the block runs; fail at its end if a check failed."""
    watch, stop, opened = Watch(), threading.Event(), Runtime.open(runtime)
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.wait(_SAMPLE_SECONDS):
                for device in snapshot(opened):
                    watch.take(device)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()
    assert not failures, failures
    assert watch.samples > 0
    assert not watch.violations, watch.violations[:5]
