"""Measure the cost of an idle rank: processor time of kvcached's threads, and how often they wake.

    python -m benchmarks.micro.idle_cost [--seconds 60] [--out FILE]

The benchmark makes the threads of one rank, a supply thread and an idle waker, gives them host memory, and
leaves them idle. At the end it rings the doorbell once, to check that both threads respond. The engine's own
idle loop is not measured.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib import options as options_of
from benchmarks.lib import record
from kvcached_core.driver.host import HostDriver
from kvcached_core.geometry import Geometry
from kvcached_core.ledger import Account, EngineUsage, Runtime, SchedulerView
from kvcached_core.scheduler.idle_waker import IdleWaker
from kvcached_core.worker.pool import ElasticPool

PAGE, GRANULES, HELD = 1 << 20, 64, 16
GOAL_SHARE = 0.001  # of a core
BOUND_SECONDS = 10.0


def _pool(runtime: Runtime) -> tuple[ElasticPool, Account]:
    driver = HostDriver(capacity_bytes=GRANULES * PAGE)
    account = Account.attach(
        runtime, driver.identity(), driver.memory().total_bytes, 0, instance="idle", rank=0, name="idle"
    )
    account.describe(
        page_bytes=PAGE, granule_bytes=PAGE, granule_count=GRANULES, blocks_per_granule=8,
        block_count=8 * GRANULES, stride_bytes=PAGE // 8,
    )  # fmt: skip
    return ElasticPool(driver, Geometry(PAGE, PAGE // 8, (0,), 8 * GRANULES, 8, GRANULES), account), account


def _wait(what: threading.Event) -> None:
    if not what.wait(BOUND_SECONDS):
        raise TimeoutError(f"nothing happened for {BOUND_SECONDS:g} s")


def measure(seconds: float) -> dict[str, list[float]]:
    """Return the processor seconds and voluntary context switches of a rank that is idle for `seconds`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        runtime = Runtime.open(Path(base) / "runtime")
        pool, account = _pool(runtime)
        view, woken = SchedulerView.find(runtime, "idle", 1), threading.Event()
        waker = IdleWaker(view.filenos(), view.drain, lambda: None, woken.set)
        try:
            pool.start()
            waker.start()
            view.publish(EngineUsage(0, 0, 0, 1, HELD, 1, 0, HELD))
            while view.created() < HELD:  # the waker is rung for each batch of granules
                _wait(woken)
                woken.clear()
            time.sleep(1.0)
            woken.clear()
            before, cpu = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
            started = time.monotonic()
            time.sleep(seconds)
            lasted = time.monotonic() - started
            cpu = time.process_time() - cpu
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before.ru_nvcsw
            view.publish(EngineUsage(0, 0, 0, 1, HELD + 1, 1, 0, HELD + 1))
            _wait(woken)
        finally:
            waker.stop()
            view.close()
            pool.close()
            account.detach()
    return {"processor_seconds": [cpu], "seconds": [lasted], "context_switches": [float(switches)]}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and write the result; exit status 1 if the goal is missed."""
    parser = options_of.parser("micro.idle_cost", __doc__, "idle_cost.json")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to measure")
    options = parser.parse_args(arguments)
    started = time.time()
    samples = measure(options.seconds)
    share = samples["processor_seconds"][0] / samples["seconds"][0]
    notes = {"share_of_a_core": share, "goal": GOAL_SHARE, "goal_met": share <= GOAL_SHARE}
    record.write(
        options.out,
        ["python", "-m", "benchmarks.micro.idle_cost", *arguments],
        samples,
        {},
        started,
        notes,
    )
    print(f"{share:.6%} of a core, {samples['context_switches'][0]:.0f} context switches "
          f"in {samples['seconds'][0]:.0f} s")  # fmt: skip
    return 0 if notes["goal_met"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
