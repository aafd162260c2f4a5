"""The simulated scenes, and the function that plays one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulation import ideal
from benchmarks.simulation.clockwork import World
from benchmarks.simulation.device import Device
from benchmarks.simulation.owner import BLOCKS_PER_GRANULE, GRANULE_BYTES, STEP_SECONDS, Owner, Terms
from benchmarks.simulation.traffic import LONG, Clients, arrivals
from benchmarks.simulation.watch import Series, Watch
from kvcached_core.errors import InvariantError
from kvcached_core.ledger import Runtime

CAPACITY_GRANULES = 1024  # 16 GiB
CAPACITY_BYTES = CAPACITY_GRANULES * GRANULE_BYTES
CHECK_SECONDS = 1.0


class Scene(NamedTuple):
    """Owners with their terms and their clients."""

    name: str
    terms: Sequence[Terms]
    clients: Sequence[Clients]
    seconds: float


class Played(NamedTuple):
    """A scene, its samples, and the ideal of each owner in granules."""

    scene: Scene
    series: Series
    floors: Any  # the part of each owner's demand that its floor guarantees
    ideal: Any
    preemptions: int
    for_floors: int  # how many of the preemptions were for another owner's floor


def bursts(owners: int, seconds: float) -> Scene:
    """Return equal owners with bursts; the device is large enough on average, but not at all times."""
    return Scene(f"bursts_{owners}", [Terms()] * owners, [Clients(1.6 / owners)] * owners, seconds)


def weighted(seconds: float) -> Scene:
    """Return owners with unequal weights, floors and limits."""
    unit = CAPACITY_BYTES // 16
    terms = (Terms(100, 4 * unit), Terms(200), Terms(400), Terms(100, unit, 6 * unit))
    return Scene("weighted_4", terms, [Clients(0.4, 0.75)] * 4, seconds)


def floors(seconds: float) -> Scene:
    """Return one owner with a floor and bursts, and three owners with a constant load of long requests."""
    terms = (*[Terms()] * 3, Terms(floor_bytes=CAPACITY_BYTES // 4))
    return Scene("floors_4", terms, (*[Clients(2.0, 1.0, LONG)] * 3, Clients(0.3)), seconds)


def steady(seconds: float) -> Scene:
    """Return equal owners under constant load."""
    return Scene("steady_4", [Terms()] * 4, [Clients(0.375, 1.0)] * 4, seconds)


def play(scene: Scene) -> Played:
    """Simulate a scene. Raises InvariantError if a check fails during the simulation or at its end."""
    world, device = World(), Device(CAPACITY_BYTES)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvcached-simulation-") as folder:
        owners = _open(scene, world, device, Runtime(Path(folder)))
        watch = Watch(world, owners)
        try:
            begin = world.now
            while world.now < begin + scene.seconds:
                world.run(world.now + CHECK_SECONDS)
                for owner in owners:
                    owner.check()
        finally:
            world.stop()
            watch.close()
            for owner in owners:
                owner.close()
        if device.free_bytes != device.capacity_bytes:
            raise InvariantError(f"I11: {device.capacity_bytes - device.free_bytes} bytes are left")
    counts = [(owner.queue.preemptions, owner.preempted_for_floors) for owner in owners]
    return _judge(scene, watch.series(), *(sum(column) for column in zip(*counts, strict=True)))


def _open(scene: Scene, world: World, device: Device, runtime: Runtime) -> list[Owner]:
    owners = []
    for number, (terms, clients) in enumerate(zip(scene.terms, scene.clients, strict=True)):
        per_second = clients.per_second(CAPACITY_GRANULES * BLOCKS_PER_GRANULE, STEP_SECONDS)
        requests = arrivals(number, clients, per_second, scene.seconds)
        owners.append(Owner(world, runtime, device, number, terms, requests))
    return owners


def _judge(scene: Scene, series: Series, preemptions: int, for_floors: int) -> Played:
    columns = [
        (
            terms.floor_bytes / GRANULE_BYTES,
            (CAPACITY_BYTES if terms.limit_bytes is None else terms.limit_bytes) / GRANULE_BYTES,
            terms.weight,
        )
        for terms in scene.terms
    ]
    floors, limits, weights = np.array(columns, dtype=float).T
    needed = series.needed.astype(float)
    fair = ideal.shares(CAPACITY_GRANULES, needed, floors, limits, weights)
    return Played(scene, series, np.minimum(needed, floors), fair, preemptions, for_floors)
