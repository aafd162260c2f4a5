"""Observe the device and both servers of benchmarks.sharing.beside through the ledger and the driver."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.lib.ledger_watch import Moment, Watch
from devkit.polling import holds_within
from kvcached_core.driver import nvml
from kvcached_core.ledger import DeviceSnapshot, Runtime, check, snapshot

POLL_SECONDS = 0.002


class Observer:
    """Samples a ledger and a driver, and collects violations."""

    def __init__(self, runtime: Runtime, on_host: bool) -> None:
        self.violations: list[str] = []
        self._on_host, self._runtime = on_host, runtime
        self.watch = Watch(runtime, self._look)
        self.note, self.between = self.watch.note, self.watch.between

    def now(self) -> Moment:
        """See Observing."""
        return self.watch.moments[-1]

    def at_rest(self) -> bool:
        """See Observing."""
        owners = [owner for device in snapshot(self._runtime) for owner in device.owners]
        return all(owner.ready_bytes == owner.granule_bytes for owner in owners)

    def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        """See Observing."""
        return holds_within(holds, seconds, POLL_SECONDS)

    def budget(self, engines: set[str]) -> int:
        """Return the bytes that `engines` may hold together. Raises RuntimeError unless on one device."""
        devices = snapshot(self._runtime)
        names = [{owner.name for owner in device.owners if owner.live} for device in devices]
        if names != [engines]:
            raise RuntimeError(f"on devices are {names}: expected {engines} on one; see the servers' logs")
        return devices[0].ready_bytes + self._free(devices[0]) - devices[0].headroom_bytes

    def _look(self, devices: list[DeviceSnapshot]) -> int:
        for device in devices:
            self.violations += check(device)
            taken = device.ready_bytes + sum(owner.private_now_bytes for owner in device.owners)
            total = device.total_bytes  # 0: no engine has asked the driver yet
            if device.settled and not self._on_host and total and taken > total:
                self.violations.append(f"{taken} bytes are taken of {device.total_bytes}")
        return min(map(self._free, devices), default=0)

    def _free(self, device: DeviceSnapshot) -> int:
        if self._on_host:
            return device.capacity_bytes - device.leased_bytes
        return nvml.memory_of(device.uuid).free_bytes
