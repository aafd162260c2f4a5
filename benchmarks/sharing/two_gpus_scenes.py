"""The scenes of benchmarks.sharing.two_gpus: engines of two ranks, and engines of one rank beside them.

On the host, both ranks are in one ledger, which takes the place of both devices.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import engines
from benchmarks.lib.engines import Engine, EngineDiedError, Scale
from benchmarks.sharing import deaths
from benchmarks.sharing.one_gpu import out_of_memory
from benchmarks.sharing.stage import START_SECONDS, Stage
from benchmarks.sharing.third_process import Insider, Outsider, Third
from kvcached_core.driver import nvml
from kvcached_core.ledger import OwnerSnapshot, Runtime, check, snapshot
from kvcached_core.ledger.peers import LEAD_GRANULES
from kvcached_core.units import MIB

RANKS = 2
HOST_UNITS = 24  # capacity on the host, for both ranks together
HEADROOM_BYTES = 16 * MIB  # on the host
REST_SECONDS, END_SECONDS = 30.0, 60.0
ROUNDS = 2  # of bursts in turn
PART = 0.7  # a burst needs this share of the memory, so another engine has to give memory up
SLOT_SECONDS = CLEAN_SECONDS = 1.0
AS_STOCK_SECONDS = 5.0  # an engine may end this much later than stock
KILLED_REQUESTS, KILLED_PROMPT, KILLED_TOKENS = 32, 200, 1500
LOAD_SECONDS = 1.0  # time from the first requests until the rank is killed


class Pairs(Stage):
    """A stage of two devices, or of the host; engines have two ranks unless said otherwise."""

    def __init__(self, scale: Scale, logs: Path, runtime: Runtime, most_seconds: float, engine: str) -> None:
        super().__init__(scale, logs, runtime, most_seconds)
        self.engine = engine
        self.ends: dict[str, int | None] = {}  # exit status of each engine that lost a rank
        self.third: Third = self._outsider()
        if scale.on_host:
            self.third = Insider(
                runtime, HOST_UNITS * scale.gib, HEADROOM_BYTES, lambda: self.watch.owner("a")
            )

    @property
    def ranks_on_a_device(self) -> int:
        """How many ranks of a two-rank engine are on one device: 1 on GPUs, 2 on the host."""
        return RANKS if self.scale.on_host else 1

    @property
    def error_units(self) -> float:
        """Tolerated difference of two fills: a fill ends within half a unit, and one rank may be ahead."""
        return 2.5 if self.scale.on_host else 1.5

    def start(self, name: str, ranks: int = RANKS, device: int | None = None,
              backend: str = "kvcached") -> Engine:  # fmt: skip
        """Start an engine of two ranks, or of one rank on `device`, without waiting until it serves."""
        options = {"headroom": str(HEADROOM_BYTES), "host_capacity": str(HOST_UNITS * self.scale.gib)}
        self.engines[name] = Engine(
            name, self.scale, self._logs, options if self.scale.on_host else {}, device or 0, ranks=ranks,
            backend=backend, engine=self.engine, environ={} if device is None else only(device),
        )  # fmt: skip
        return self.engines[name]

    def ranks(self, name: str) -> list[OwnerSnapshot]:
        """Return the ledger entries of an engine's ranks, in the order of ranks."""
        owners = [owner for device in snapshot(self.runtime) for owner in device.owners if owner.live]
        return sorted((owner for owner in owners if owner.name == name), key=lambda owner: owner.rank)

    def room_units(self) -> float:
        """Return how many units of KV cache one rank could have if it were alone on its device."""
        rooms = [
            device.capacity_bytes - device.headroom_bytes
            - sum(owner.private_peak_bytes for owner in device.owners if owner.live)
            for device in snapshot(self.runtime)
        ]  # fmt: skip
        return min(rooms) / self.ranks_on_a_device / self.scale.gib

    def free(self, when: str) -> list[int]:
        """Return and record the free bytes of each device: the driver's figure, on the host the ledger's."""
        found = [
            device.capacity_bytes - device.leased_bytes
            if self.scale.on_host else nvml.memory_of(device.uuid).free_bytes
            for device in snapshot(self.runtime)
        ]  # fmt: skip
        for number, size_bytes in enumerate(found):
            self.samples.setdefault(f"free_{when}_bytes_device{number}", []).append(size_bytes)
        return found

    def flush(self, name: str) -> None:
        """Drop an engine's prefix cache, and wait until each rank holds only one granule."""
        engine = self.engines[name]
        self.until(  # the engine refuses until its last step has ended
            lambda: engine.result(engine.ask("flush"), self.seconds(REST_SECONDS))["done"],
            REST_SECONDS, f"{name} forgets its cache",
        )  # fmt: skip
        self.until(
            lambda: all(rank.ready_bytes == rank.granule_bytes for rank in self.ranks(name)),
            REST_SECONDS, f"{name} is at rest",
        )  # fmt: skip

    def full_bytes(self, name: str, when: str) -> int:
        """Fill an engine's cache; return the bytes of its blocks, and record the bytes of each rank."""
        self.fill(name)
        ranks = self.ranks(name)
        for rank in ranks:
            self.samples.setdefault(f"{name}_{when}_bytes_rank{rank.rank}", []).append(rank.ready_bytes)
        lead = max(rank.ready_bytes for rank in ranks) - min(rank.ready_bytes for rank in ranks)
        self.checks[f"no rank of {name} is far ahead, {when}"] = (
            lead <= LEAD_GRANULES * ranks[0].granule_bytes
        )
        return engines.content_bytes(ranks[0])

    def _outsider(self) -> Third:
        return Outsider("cuda", only(1))


def only(device: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which a process sees only one of the visible devices."""
    ours = environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": ours.split(",")[device].strip() if ours else str(device)}


def stock_loses_a_rank(stage: Pairs) -> None:
    """Kill one rank of a stock engine, for comparison."""
    stage.start("stock", backend="stock").wait_ready(stage.seconds(START_SECONDS))
    lose_a_rank(stage, "stock")


def lose_a_rank(stage: Pairs, name: str) -> dict[str, float]:
    """Kill rank 1 under load; return and record the seconds of deaths.kill_rank."""
    engine = stage.engines[name]
    engine.result(engine.burst(4, KILLED_PROMPT, 8, 77), stage.seconds(END_SECONDS))
    load = engine.burst(KILLED_REQUESTS, KILLED_PROMPT, KILLED_TOKENS, 78)
    first = deaths.first_seconds({"answered": load.done}, stage.seconds(LOAD_SECONDS))
    stage.checks[f"{name} lost its rank under load"] = not first
    seconds = deaths.kill_rank(engine, 1, stage.runtime, stage.seconds(END_SECONDS))
    stage.samples |= {f"{name}_{what}_seconds": [value] for what, value in seconds.items()}
    stage.ends[name] = engine.status
    stage.watch.note(f"{name} lost rank 1, ended with {engine.status}: {seconds}")
    engine.kill()
    return seconds


def third_process(stage: Pairs) -> None:
    """Another process takes a quarter of device 1 (half of the host), at most 20 units, under load."""
    stage.start("a")
    stage.ready("a")
    taken = int(min(20.0, stage.room_units() / 4 * stage.ranks_on_a_device**2)) * stage.scale.gib
    alone = stage.full_bytes("a", "alone")
    stage.flush("a")
    stage.free("before_third")
    load = stage.burst("a", stage.room_units() / 4)
    stage.third.take(taken)
    went_on = stage.end("a", load, "a_beside_third")["failed"] == 0
    beside = stage.full_bytes("a", "beside_third")
    free = stage.free("beside_third")
    stage.third.leave()
    again = stage.full_bytes("a", "after_third")
    stage.free("after_third")
    stage.samples |= {"third_bytes": [taken], "a_content_bytes": [alone, beside, again]}
    stage.watch.note(f"A had {alone}, beside the third {beside}, then {again}; the third {taken}")
    error, lost = stage.error_units * stage.scale.gib, taken / stage.ranks_on_a_device
    stage.checks["requests went on beside the third process"] = went_on
    stage.checks["A's budget was the least of both devices"] = abs(alone - beside - lost) <= error
    stage.checks["A grew back when the third process had left"] = again >= alone - error
    if not stage.scale.on_host:
        stage.checks["what device 0 had over was left alone"] = max(free) - min(free) >= taken - error


def in_turn(stage: Pairs, names: str, what: str) -> None:
    """Run bursts that need most of the memory, in turn, then at once: memory must move, none may fail."""
    units, peaks, failed = PART * stage.room_units(), defaultdict(list), 0
    for number in range(ROUNDS):
        for name in names:
            before, since = stage.ranks(name)[0].ready_bytes, stage.watch.moments[-1].at
            failed += stage.end(name, stage.burst(name, units), f"{name}_{what}_{number}")["failed"]
            peaks[name].append(stage.peak(name, since))
            stage.samples.setdefault(f"{name}_{what}_before_bytes", []).append(before)
    asked = {name: stage.burst(name, units) for name in names}
    for name, each in asked.items():
        failed += stage.end(name, each, f"{name}_{what}_at_once")["failed"]
    stage.samples |= {f"{name}_{what}_peak_bytes": values for name, values in peaks.items()}
    stage.checks[f"{what}: all requests ended"] = not failed
    stage.checks[f"{what}: each had most of the memory in its turn"] = all(
        value >= 0.8 * units * stage.scale.gib for values in peaks.values() for value in values
    )
    stage.free(what)


def two_pairs(stage: Pairs) -> None:
    """Run two engines of two ranks on the same devices."""
    stage.start("b")
    stage.ready("b")
    in_turn(stage, "ab", "two_pairs")


def a_loses_a_rank(stage: Pairs) -> None:
    """Kill one rank of A; B must get the memory of both ranks."""
    stage.fill("a")
    had = stage.ranks("b")[0].ready_bytes
    check_end(stage, "a", lose_a_rank(stage, "a"))
    grown = stage.full_bytes("b", "after_a")
    stage.samples |= {"b_before_death_bytes": [had], "b_after_death_bytes": [grown]}
    least = (stage.room_units() - stage.error_units) * stage.scale.gib
    stage.checks["B grew into what A had"] = grown >= max(least, had)


def check_end(stage: Pairs, name: str, seconds: Mapping[str, float]) -> None:
    """Compare an engine's end with the stock engine's end; `seconds` are those of deaths.kill_rank."""
    stock = stage.samples.get("stock_ended_seconds", [0.0])[0]
    stage.checks[f"{name} ended as stock, all its processes with it"] = (
        "stock" in stage.ends and stage.ends[name] == stage.ends["stock"]
        and "gone" in seconds and seconds["ended"] <= stock + AS_STOCK_SECONDS
    )  # fmt: skip
    stage.checks[f"the slot of {name}'s killed rank was free within a second"] = (
        seconds.get("slot_free", END_SECONDS) <= SLOT_SECONDS
    )
    stage.checks[f"all ledgers were clean within a second of {name}'s end"] = (
        "gone" in seconds and seconds.get("clean", END_SECONDS) - seconds["gone"] <= CLEAN_SECONDS
    )


def pair_beside_singles(stage: Pairs) -> None:
    """Run B, which has two ranks, beside X on device 0 and Y on device 1, which have one rank each."""
    for device, name in enumerate("xy"):
        stage.start(name, ranks=1, device=device)
    for name in "xy":
        stage.ready(name)
    in_turn(stage, "bxy", "pair_and_singles")


def judge(stage: Pairs) -> None:
    """Check the run as a whole: the plans of the ranks, the ledgers, the logs."""
    stage.third.leave()
    stage.checks["nobody was out of memory"] = not out_of_memory(stage)
    stage.checks["all ledgers add up"] = not any(check(device) for device in snapshot(stage.runtime))
    living = {name for name, engine in stage.engines.items() if engine.alive}
    stage.checks["all live that were not killed"] = living == set("bxy")
    for name in living:
        stage.flush(name)
        stage.checks[f"each rank of {name} has done all plans in order"] = is_in_order(stage, name)


def is_in_order(stage: Pairs, name: str) -> bool:
    """Make each rank check its pool, and return whether the engine is alive: a plan out of order ends it."""
    engine = stage.engines[name]
    try:
        engine.result(engine.ask("check"), stage.seconds(REST_SECONDS))
    except EngineDiedError:
        return False
    return True


SCENES: dict[str, Callable[[Any], None]] = {
    "stock loses a rank": stock_loses_a_rank,
    "a third process": third_process,
    "two pairs": two_pairs,
    "A loses a rank": a_loses_a_rank,
    "a pair beside singles": pair_beside_singles,
    "at the end": judge,
}
