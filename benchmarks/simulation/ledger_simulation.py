"""Simulate how fairly and how fast owners share a device, without engines.

    python -m benchmarks.simulation.ledger_simulation [--seconds N] [--out FILE]

An owner has a real governor with granules, a real pool and account, and a scheduler like vLLM's with steps
of 25 ms. The clock is simulated, and a driver call takes 37 us. The device has 1024 granules of 16 MiB. The
scenes:

    bursts_N     N equal owners; every 4 s a random draw decides whether an owner's clients send
    weighted_4   weights 100, 200, 400, 100; floors 256, 0, 0, 64; the last owner's limit is 384
    floors_4     one owner with a floor of 256 and bursts; three owners with a constant load of long requests
    steady_4     equal owners under constant load: no memory should move

Results are compared with the ideal: floors first, then max-min fairness of the true demand, which is the
memory of running and waiting requests. `deviation` is the memory by which all owners together are below the
ideal, in percent of the device, at instants more than 1 s after clients began or stopped to send. `reclaim`
is the time from a refused lease until the owner has its share, or floor, of that instant. `wait` is the time
until the owner has its current share or floor, which may rise meanwhile. An owner gives memory up when its
requests end: after 0.8 to 2.4 s, in floors_4 after 5 to 15 s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from benchmarks.plots.ledger import simulation
from benchmarks.simulation import decisions, scenes, traffic, watch
from benchmarks.simulation.scenes import CAPACITY_GRANULES, Played, Scene
from devkit.statistics import percentile

OWNERS = (2, 4, 8, 16)
LEASING_OWNERS = (2, 4, 8, 16, 32, 64)
REPEATS = 200
DRAWN_EVERY, JUDGED_EVERY = 40, 4  # in samples: a picture has one in 200 ms, the deviation one in 20 ms
SETTLED_SECONDS = 1.0
TOLERATED_GRANULES = 1.0  # shares are whole granules, and an engine's spare memory arrives one by one

STATISTICS = (
    "deviation_percent", "share_reclaim_seconds", "share_wait_seconds", "floor_reclaim_seconds",
    "floor_wait_seconds", "driver_calls_per_second",
)  # fmt: skip

Samples = dict[str, list[float]]


def all_scenes(seconds: float) -> list[Scene]:
    """Return all scenes, of `seconds` simulated seconds each."""
    more = [scenes.weighted(seconds), scenes.floors(2 * seconds), scenes.steady(seconds)]
    return [scenes.bursts(owners, seconds) for owners in OWNERS] + more


def samples_of(played: Played) -> Samples:
    """Return the samples of one scene, by name."""
    scene, series = played.scene, played.series
    settled = watch.settled(series, traffic.changes(scene.clients, scene.seconds), SETTLED_SECONDS)
    lacking = watch.shortfall(series, played.ideal) / CAPACITY_GRANULES * 100
    edits = series.edits.sum(axis=1)
    each_second = np.searchsorted(series.seconds, np.arange(0, series.seconds[-1]))
    found = {
        "deviation_percent": lacking[settled][::JUDGED_EVERY],
        "driver_calls_per_second": np.diff(edits[each_second]),
        "drawn_seconds": series.seconds[::DRAWN_EVERY],
    }
    for name, line in (("share", played.ideal), ("floor", played.floors)):
        waits = watch.episodes(series, line, TOLERATED_GRANULES)
        found[f"{name}_reclaim_seconds"] = np.array([wait.delay_seconds for wait in waits])
        found[f"{name}_wait_seconds"] = np.array([wait.seconds for wait in waits])
    for owner in range(len(scene.terms)):
        found[f"owner_{owner}_held_granules"] = series.ready[::DRAWN_EVERY, owner]
        found[f"owner_{owner}_ideal_granules"] = played.ideal[::DRAWN_EVERY, owner]
    return {
        f"{scene.name}.{name}": np.round(values, 3).tolist() for name, values in found.items() if len(values)
    }


def summary(played: Played, samples: Samples) -> dict[str, Any]:
    """Return the summary of one scene, for notes and output."""
    name, series = played.scene.name, played.series
    found: dict[str, Any] = {
        "preemptions": played.preemptions,
        "preemptions_for_floors": played.for_floors,
        "requests": int(series.finished[-1].sum()),
    }
    for what in STATISTICS:
        values = samples.get(f"{name}.{what}")
        if values:
            found[what] = {
                "count": len(values),
                "mean": round(sum(values) / len(values), 4),
                "p50": percentile(values, 50),
                "p99": percentile(values, 99),
                "max": max(values),
            }
    ends = watch.episodes(series, played.ideal, TOLERATED_GRANULES)
    found["waits_at_the_end"] = sum(not wait.ended for wait in ends)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the scenes, write and draw the result; returns the exit status."""
    name = "ledger_simulation"
    parser = options_of.parser(f"simulation.{name}", __doc__, f"{name}.json", options_of.PICTURE_TOO)
    parser.add_argument(
        "--seconds", type=float, default=40.0,
        help="simulated seconds of each scene; floors_4 takes twice as many",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.seconds < 2 * traffic.STAGE_SECONDS:
        parser.error(f"expected at least {2 * traffic.STAGE_SECONDS:g} seconds")
    started = time.time()
    samples: Samples = {}
    summaries: dict[str, Any] = {}
    for scene in all_scenes(options.seconds):
        played = scenes.play(scene)
        found = samples_of(played)
        samples |= found
        summaries[scene.name] = summary(played, found)
        print(scene.name, summaries[scene.name], flush=True)
    for owners in LEASING_OWNERS:
        for kind, times in decisions.lease_microseconds(owners, REPEATS).items():
            samples[f"lease_{kind}_{owners}_microseconds"] = times
            middle, tail = (percentile(times, percent) for percent in (50, 99))
            print(f"a {kind} lease among {owners}: {middle:.0f} us, p99 {tail:.0f} us", flush=True)
    notes = {"capacity_granules": CAPACITY_GRANULES, "scenes": summaries}
    command = ["python", "-m", "benchmarks.simulation.ledger_simulation", *arguments]
    record.write(options.out, command, samples, {}, started, notes)
    simulation({"samples": samples, "notes": notes}, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
