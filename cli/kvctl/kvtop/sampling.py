"""Pictures of the ledgers one after the other: rates between two of them, and curves over minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvctl.devices import choose_devices

BUCKET_SECONDS, BUCKETS = 5.0, 60  # a curve is five minutes

RankKey = tuple[str, str, int]  # folder, instance, rank: an engine's rank as long as it lives


class Rates(NamedTuple):
    """What happened a second, between this picture and the one before."""

    leases: float = 0.0
    reclaims: float = 0.0


class RankSample(NamedTuple):
    """One rank of an engine."""

    key: RankKey
    owner: OwnerSnapshot
    rates: Rates
    curve: tuple[int, ...]  # bytes held, the most in each bucket, newest last


class DeviceSample(NamedTuple):
    """One device with the ranks on it; `place` is its place in the list of all."""

    place: int
    device: DeviceSnapshot
    engines: tuple[RankSample, ...]
    rates: Rates
    curve: tuple[int, ...]


class Sample(NamedTuple):
    """All devices at one moment. `now_ms` is on the clock of the ledgers."""

    devices: tuple[DeviceSample, ...]
    now_ms: int
    wall_seconds: float


class PeakHistory:
    """The most in each bucket of time, for the latest minutes."""

    def __init__(self) -> None:
        self._buckets: deque[int] = deque(maxlen=BUCKETS)
        self._newest: int | None = None

    def add(self, at_seconds: float, value: int) -> tuple[int, ...]:
        """Note a value, and return the curve; buckets in which nobody looked repeat the one before."""
        bucket = int(at_seconds // BUCKET_SECONDS)
        if self._newest is None or bucket > self._newest:
            gap = 0 if self._newest is None else min(BUCKETS, bucket - self._newest - 1)
            self._buckets.extend([self._buckets[-1]] * gap if gap else [])
            self._buckets.append(value)
            self._newest = bucket
        else:
            self._buckets[-1] = max(self._buckets[-1], value)
        return tuple(self._buckets)


class Sampler:
    """Takes pictures of the ledgers under a runtime directory, or of one device."""

    def __init__(self, runtime: Runtime, device: str | None = None,
                 clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time) -> None:  # fmt: skip
        self._runtime, self._device = runtime, device
        self._clock, self._wall = clock, wall
        self._at = 0.0
        self._counts: dict[RankKey, Rates] = {}
        self._curves: dict[RankKey, PeakHistory] = {}

    def sample(self) -> Sample:
        """Take one. Raises LedgerError, or CommandError for a device that is not there."""
        devices = snapshot(self._runtime)
        chosen = choose_devices(devices, self._device)
        now = self._clock()
        places = {device.folder: place for place, device in enumerate(devices)}
        counts: dict[RankKey, Rates] = {}
        found = tuple(self._device_of(places[each.folder], each, now, counts) for each in chosen)
        self._counts, self._at = counts, now
        self._curves = {key: curve for key, curve in self._curves.items() if key in counts or not key[1]}
        return Sample(found, time.monotonic_ns() // 1_000_000, self._wall())

    def _device_of(
        self, place: int, device: DeviceSnapshot, now: float, counts: dict[RankKey, Rates]
    ) -> DeviceSample:
        engines = tuple(self._engine_of(device.folder, owner, now, counts) for owner in device.owners)
        rates = Rates(*(sum(each) for each in zip(*(engine.rates for engine in engines), strict=True)))
        curve = self._curve((device.folder, "", 0), now, device.ready_bytes)
        return DeviceSample(place, device, engines, rates, curve)

    def _engine_of(
        self, folder: str, owner: OwnerSnapshot, now: float, counts: dict[RankKey, Rates]
    ) -> RankSample:
        key = (folder, owner.instance, owner.rank)
        counts[key] = Rates(owner.leases, owner.reclaims)
        before, seconds = self._counts.get(key), now - self._at
        rates = Rates()
        if before is not None and seconds > 0:
            rates = Rates(*(max(0.0, new - old) / seconds
                            for new, old in zip(counts[key], before, strict=True)))  # fmt: skip
        return RankSample(key, owner, rates, self._curve(key, now, owner.ready_bytes))

    def _curve(self, key: RankKey, now: float, value: int) -> tuple[int, ...]:
        return self._curves.setdefault(key, PeakHistory()).add(now, value)
