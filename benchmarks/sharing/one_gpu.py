"""Share one GPU between four vLLM engines of the shape of Llama-8B, each with vLLM's default share (0.9).

    python -m benchmarks.sharing.one_gpu --out benchmarks/results/sharing.json

Three engines start in the same second and have peaks of load, in turn and at once. One engine is killed in
its peak. A fourth engine starts while another has filled the device with its prefix cache. Prompts of maximum
length run beside a full cache. One engine answers the same prompts at the start, in the middle and at the
end. A failed scene does not stop the next one; the exit status is 1 if a scene or a check failed. Takes 4
minutes on an H100. Without a GPU (or with `--host --model FOLDER`) it runs on the CPU with small sizes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.lib import engines
from benchmarks.lib import options as options_of
from benchmarks.lib.ledger_watch import Moment
from benchmarks.lib.record import print_checks, write
from benchmarks.lib.runtime import own_runtime
from benchmarks.sharing.stage import NAMES, Stage
from kvcached_core.ledger import snapshot

KILL_SECONDS = 20.0
SERIES_SECONDS = 0.25
ROUNDING_BLOCKS = 64  # tolerance in blocks: each layer's blocks begin on a page boundary
OUT_OF_MEMORY = ("CUDA out of memory", "OutOfMemoryError")


def three_at_once(stage: Stage) -> None:
    """Three engines start in the same second; all must serve, each with the capacity it would have alone."""
    begun = time.monotonic()
    for name in "abc":
        stage.start(name)
    stage.checks["three started within a second"] = time.monotonic() - begun < 1.0
    for name in "abc":
        stage.ready(name)
    device = snapshot(stage.runtime)[0]
    owner = stage.watch.owner("a")
    alone = device.capacity_bytes // engines.block_bytes(owner)
    missing = [alone - stage.samples[f"{name}_blocks"][0] for name in "abc"]
    stage.samples["blocks_of_the_device"] = [alone]
    stage.checks["each has the blocks of the whole device"] = (
        len(set(missing)) == 1 and 0 <= missing[0] < ROUNDING_BLOCKS
    )
    asked = stage.engines["a"].ask("randomize", seed=7, deviation=0.05)
    stage.engines["a"].result(asked, stage.seconds(60.0))
    stage.probe()


def peaks(stage: Stage) -> None:
    """A, B and C have a peak in turn, which needs most of the memory; then all three have a peak at once."""
    used, begun, failed = [], time.monotonic(), 0
    for name in "abc":
        since = time.monotonic()
        failed += stage.end(name, stage.burst(name, 18), f"{name}_peak")["failed"]
        used.append(stage.peak(name, since, "used"))
        stage.samples[f"{name}_peak_used_bytes"] = [used[-1]]
        stage.watch.note(f"{name.upper()} had a peak of {used[-1] / stage.scale.gib:.1f}")
    asked = {name: stage.burst(name, 16) for name in "abc"}
    for name, each in asked.items():
        failed += stage.end(name, each, f"{name}_at_once")["failed"]
    stage.watch.note("all three had a peak at once")
    most = max(sum(each.held for each in moment.seen.values()) for moment in stage.watch.between(begun))
    stage.samples["most_held_by_all_bytes"] = [most]
    stage.checks["no request failed in the peaks"] = not failed
    stage.checks["each peak was over a third of the memory"] = min(used) > most / 3
    stage.probe()


def killed_in_its_peak(stage: Stage) -> None:
    """C is killed while A and C have a peak: A must go on and get the memory of C."""
    a, c = stage.burst("a", 32), stage.burst("c", 12)
    unit = stage.scale.gib
    stage.until(
        lambda: min(stage.watch.owner("a").used_bytes, stage.watch.owner("c").used_bytes) > 4 * unit
        or a.done() or c.done(),
        KILL_SECONDS, "A and C are in their peaks",
    )  # fmt: skip
    held = {name: stage.watch.owner(name).ready_bytes for name in "ac"}
    stage.checks["C was killed in its peak, and A was in its own"] = not (a.done() or c.done())
    killed = time.monotonic()
    stage.engines["c"].send_kill()
    stage.watch.note(f"C is killed; it held {held['c'] / unit:.1f}, A {held['a'] / unit:.1f}")

    def owners() -> dict[str, bool]:
        return {owner.name: owner.live for device in snapshot(stage.runtime) for owner in device.owners}

    stage.until(lambda: not owners().get("c"), KILL_SECONDS, "C is known to be dead")
    stage.samples["c_dead_seconds"] = [time.monotonic() - killed]
    stage.until(lambda: "c" not in owners(), KILL_SECONDS, "C's slot is free")
    stage.samples["c_slot_free_seconds"] = [time.monotonic() - killed]
    stage.watch.note(f"C's slot is free {stage.samples['c_slot_free_seconds'][0]:.2f} s after")
    answer = stage.end("a", a, "a_beside_a_death")
    after = stage.peak("a", killed)
    stage.samples |= {"a_held_at_death_bytes": [held["a"]], "c_held_at_death_bytes": [held["c"]],
                      "a_held_after_death_bytes": [after]}  # fmt: skip
    stage.watch.note(f"A has finished and held up to {after / unit:.1f}")
    stage.checks["A went on after C's death"] = not answer["failed"] and answer["tokens"] > 0
    stage.checks["A came to hold more than before, and more than C left"] = after > max(held.values())


def start_beside_a_full_cache(stage: Stage) -> None:
    """A has filled the device with its cache. All make room for the start of D, and A still answers."""
    stage.fill("a")
    before, begun = stage.watch.owner("a").ready_bytes, time.monotonic()
    stage.start("d")
    stage.ready("d")
    loading = stage.watch.between(begun)
    least = min(moment.of("a").held for moment in loading)
    stage.samples |= {"a_held_before_d_bytes": [before], "a_least_held_bytes": [least]}
    stage.samples["room_for_d_seconds"] = [room_seconds(loading)]
    gave = (before - least) / stage.scale.gib
    stage.watch.note(f"A gave {gave:.1f}; D waited {stage.watch.starting_seconds('d'):.2f} s for it")
    stage.checks["D came up beside a full cache"] = True
    stage.checks["D has the blocks of the whole device"] = stage.samples["d_blocks"] == stage.samples.get(
        "a_blocks"
    )
    failed = [stage.end(name, stage.burst(name, 2), f"{name}_after_d_started")["failed"] for name in "ad"]
    stage.checks["A and D answer"] = not any(failed)


def room_seconds(moments: list[Moment]) -> float:
    """Return the seconds from D's first claim on memory until its start was admitted."""
    waiting = [moment.at for moment in moments if moment.of("d").starting]
    return waiting[-1] - waiting[0] if waiting else 0.0


def prefill_beside_a_full_cache(stage: Stage) -> None:
    """A's cache is full. B gets prompts of the maximum length, with several times the tokens of a step."""
    stage.fill("a")
    info = stage.engines["b"].info
    length, generate = info["max_model_len"] - 8, 8
    count = 4 * max(1, info["max_num_batched_tokens"] // info["max_model_len"])
    asked = stage.engines["b"].burst(count, length, generate, 999)
    answer = stage.end("b", asked, "b_full_prefill")
    stage.samples["b_full_prefill_prompts"] = [count]
    stage.watch.note(f"B has prefilled {count} prompts of {length} tokens")
    stage.checks["all tokens of the prefill came"] = answer["tokens"] == count * generate
    stage.probe()


def play(stage: Any, save: Callable[[Any], None], scenes: Mapping[str, Callable[[Any], None]]) -> None:
    """Run every scene on a Stage, even after a failed scene."""
    try:
        for name, scene in scenes.items():
            stage.watch.note(f"scene: {name}")
            try:
                stage.seconds(1.0)
                scene(stage)
            except Exception as error:
                stage.failures[name] = f"{type(error).__name__}: {error}"
                stage.watch.note(f"scene failed: {stage.failures[name][:300]}")
            save(stage)
    finally:
        stage.watch.stop()
        for engine in stage.engines.values():
            engine.kill()


def out_of_memory(stage: Stage) -> list[str]:
    """Return the lines of the engines' logs that report a lack of memory."""
    logs = [engine.log.read_text(errors="replace") for engine in stage.engines.values()]
    return [line for text in logs for line in text.splitlines() if any(w in line for w in OUT_OF_MEMORY)]


def judge(stage: Stage) -> None:
    """Check the run as a whole."""
    stage.checks["nobody was out of memory"] = not out_of_memory(stage)
    stage.checks["all but C live"] = {n for n, e in stage.engines.items() if e.alive} == set("abd")
    stage.checks["A says the same at the start, in the middle and at the end"] = len(
        stage.probes
    ) == 3 and not any(stage.samples["probes_different"])


SCENES: dict[str, Callable[[Stage], None]] = {
    "three at once": three_at_once,
    "peaks": peaks,
    "killed in its peak": killed_in_its_peak,
    "start beside a full cache": start_beside_a_full_cache,
    "prefill beside a full cache": prefill_beside_a_full_cache,
    "at the end": judge,
}


def main() -> int:
    """Run the scenes and write the result."""
    parser = options_of.parser("sharing.one_gpu", __doc__)
    options_of.add_engines(parser, "sharing")
    options_of.add_time_limit(parser, 480.0)
    options = parser.parse_args()
    started = time.time()
    scale = engines.scale(options.host, options.model)

    def save(stage: Stage) -> None:
        samples = stage.watch.series(NAMES, SERIES_SECONDS) | stage.samples
        notes = {"events": stage.watch.events, "checks": stage.checks, "failures": stage.failures,
                 "unit_bytes": scale.gib}  # fmt: skip
        write(options.out, sys.argv, samples, {}, started, notes)

    with own_runtime() as runtime:
        stage = Stage(scale, options.logs, runtime, options.most_seconds)
        play(stage, save, SCENES)
    return max(print_checks(stage.checks), int(bool(stage.failures)))


if __name__ == "__main__":
    sys.exit(main())
