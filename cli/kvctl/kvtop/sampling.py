"""Samples of the ledgers taken one after the other, with rates between two samples and minutes of history."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.ledger.snapshot import DeviceSnapshot, OwnerSnapshot, snapshot
from kvctl.devices import choose_devices

BUCKET_SECONDS, BUCKETS = 5.0, 60  # the history is five minutes long

RankKey = tuple[str, str, int]  # device folder, instance, rank; the same as long as the rank lives


class Rates(NamedTuple):
    """Events per second between this sample and the one before."""

    leases: float = 0.0
    reclaims: float = 0.0


class RankSample(NamedTuple):
    """One rank of an engine."""

    key: RankKey
    owner: OwnerSnapshot
    rates: Rates
    held_history: tuple[int, ...]  # the most bytes held in each bucket, newest last


class DeviceSample(NamedTuple):
    """One device with its ranks. `place` is its number in `kvctl list`."""

    place: int
    snapshot: DeviceSnapshot
    ranks: tuple[RankSample, ...]
    rates: Rates
    held_history: tuple[int, ...]


class Sample(NamedTuple):
    """All devices at one moment. `now_ms` is on the ledgers' clock."""

    devices: tuple[DeviceSample, ...]
    now_ms: int
    wall_seconds: float


class PeakHistory:
    """The largest value in each of the latest `BUCKETS` buckets of `BUCKET_SECONDS`."""

    def __init__(self) -> None:
        self._buckets: deque[int] = deque(maxlen=BUCKETS)
        self._newest: int | None = None

    def add(self, at_seconds: float, value: int) -> tuple[int, ...]:
        """Add a value and return the history. A bucket without values repeats the bucket before it."""
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
    """Samples the ledgers in a runtime directory, or the ledger of one device."""

    def __init__(self, runtime: Runtime, device: str | None = None,
                 clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time) -> None:  # fmt: skip
        self._runtime, self._device = runtime, device
        self._clock, self._wall = clock, wall
        self._sampled_at = 0.0
        self._counts: dict[RankKey, Rates] = {}  # totals since the rank started, at the latest sample
        self._histories: dict[RankKey, PeakHistory] = {}

    def sample(self) -> Sample:
        """Take a sample. Raises LedgerError, or CommandError if the device has no ledger."""
        devices = snapshot(self._runtime)
        chosen = choose_devices(devices, self._device)
        now = self._clock()
        places = {device.folder: place for place, device in enumerate(devices)}
        counts: dict[RankKey, Rates] = {}
        sampled = tuple(self._device_of(places[each.folder], each, now, counts) for each in chosen)
        self._counts, self._sampled_at = counts, now
        self._histories = {
            key: history for key, history in self._histories.items() if key in counts or not key[1]
        }
        return Sample(sampled, time.monotonic_ns() // 1_000_000, self._wall())

    def _device_of(
        self, place: int, device: DeviceSnapshot, now: float, counts: dict[RankKey, Rates]
    ) -> DeviceSample:
        ranks = tuple(self._rank_of(device.folder, owner, now, counts) for owner in device.owners)
        rates = Rates(*(sum(each) for each in zip(*(rank.rates for rank in ranks), strict=True)))
        history = self._history_of((device.folder, "", 0), now, device.ready_bytes)
        return DeviceSample(place, device, ranks, rates, history)

    def _rank_of(
        self, folder: str, owner: OwnerSnapshot, now: float, counts: dict[RankKey, Rates]
    ) -> RankSample:
        key = (folder, owner.instance, owner.rank)
        counts[key] = Rates(owner.leases, owner.reclaims)
        before, seconds = self._counts.get(key), now - self._sampled_at
        rates = Rates()
        if before is not None and seconds > 0:
            rates = Rates(*(max(0.0, new - old) / seconds
                            for new, old in zip(counts[key], before, strict=True)))  # fmt: skip
        return RankSample(key, owner, rates, self._history_of(key, now, owner.ready_bytes))

    def _history_of(self, key: RankKey, now: float, value: int) -> tuple[int, ...]:
        return self._histories.setdefault(key, PeakHistory()).add(now, value)
