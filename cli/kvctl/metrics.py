"""The collector that gives Prometheus the metrics of all ledgers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvcached_core.ledger.tools.metric_families import (
    device_families,
    live_ranks,
    metric_names,
    rank_families,
)
from kvctl.devices import choose_devices
from kvctl.exit_codes import CommandError

DEVICE_LABELS = ("gpu", "UUID")
ENGINE_LABELS = (*DEVICE_LABELS, "engine", "model", "name", "rank")
READABLE = "kvcached_ledger_readable"
READABLE_HELP = "1 if the ledgers can be read."
PREFIX = "kvcached_"


class LedgerCollector:
    """Reads the ledgers at each scrape and does nothing between two scrapes.

    `open_runtime` opens the runtime directory and raises LedgerError if it is not safe to use. It is called
    at each scrape, because the directory may be made, or given another owner, after the exporter started.
    `report` is called with the reason when the ledgers cannot be read, once until the reason changes.
    """

    def __init__(
        self, open_runtime: Callable[[], Runtime], device: str | None, report: Callable[[str], None]
    ) -> None:
        self._open_runtime, self._device, self._report = open_runtime, device, report
        self.unreadable: str | None = None  # why the ledgers could not be read at the last scrape

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering the collector reads no ledger."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every family. If the ledgers cannot be read, yield only the metric that says so."""
        try:
            all_devices = snapshot(self._open_runtime())
            chosen = {device.folder for device in choose_devices(all_devices, self._device)}
        except (KVCachedError, CommandError, OSError) as error:
            if str(error) != self.unreadable:
                self.unreadable = str(error)
                self._report(self.unreadable)
            yield GaugeMetricFamily(READABLE, READABLE_HELP, value=0)
            return
        self.unreadable = None
        yield GaugeMetricFamily(READABLE, READABLE_HELP, value=1)
        devices: dict[tuple[str, ...], DeviceSnapshot] = {
            (str(place), device.uuid): device
            for place, device in enumerate(all_devices)
            if device.folder in chosen
        }
        ranks: dict[tuple[str, ...], OwnerSnapshot] = {
            (*labels, owner.engine, owner.model, owner.name, str(owner.rank)): owner
            for labels, device in devices.items()
            for owner in live_ranks(device)
        }
        yield from device_families(PREFIX, DEVICE_LABELS, devices)
        yield from rank_families(PREFIX, ENGINE_LABELS, ranks)


def names() -> Iterable[str]:
    """Return the names of all metrics that the collector yields."""
    return (READABLE, *metric_names(PREFIX))
