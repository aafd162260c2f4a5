"""Unmap granules behind fences while kernels run, thousands of times, in a child process.

    python -m benchmarks.micro.fence_stress --rounds 10000 --out benchmarks/results/fence_stress.json

Every round unmaps the granule that the previous round's kernels wrote to, as soon as its fence has passed,
while this round's kernels run on another granule. The kernels still run at the unmap: an event recorded
behind them has not completed then. A control run does not wait for the fences and has to fail. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import options as options_of
from benchmarks.lib.record import write
from kvcached_core.units import MIB

PAGE_BYTES = 16 * MIB
GRANULES = 64
LAUNCHES = 8  # kernels of a round that write to its granule
SPIN_CYCLES = 300_000  # length of a kernel (0.17 ms) before each write: keeps the device behind the host
CHILD_SECONDS = 150


class Watched:
    """A driver that counts, at every unmap, whether the newest kernels were still running."""

    def __init__(self, driver: Any, skip_fences: bool) -> None:
        self._driver = driver
        self._skip_fences = skip_fences
        self.sentinel: Any = None
        self.in_flight = self.at_rest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def passed(self, fence: Any) -> bool:
        return self._skip_fences or bool(self._driver.passed(fence))

    def unmap(self, address: int, page_bytes: int, count: int = 1) -> None:
        # Queried before the unmap: kernels that are incomplete now can end only later than this moment.
        if self.sentinel is not None and not self.sentinel.query():
            self.in_flight += count
        else:
            self.at_rest += count
        self._driver.unmap(address, page_bytes, count)


class Account:
    """An account that grants every lease: this benchmark tests fences, not shares."""

    def __init__(self, granule_bytes: int) -> None:
        self.granule_bytes = granule_bytes
        self.wanted_bytes = GRANULES * granule_bytes
        self.leased_bytes = self.ready_bytes = self.created_most = 0

    def fileno(self) -> int:
        return -1

    def drain(self) -> None: ...
    def acknowledge(self) -> None: ...
    def refuse(self, unmet_bytes: int) -> None: ...
    def publish(self, mapped_bytes: int, private_now_bytes: int, maps: int = 0, unmaps: int = 0,
                map_times: Sequence[int] = ()) -> None: ...  # fmt: skip

    def lease(self, want_bytes: int, memory: Any) -> int:
        self.leased_bytes += want_bytes
        return want_bytes

    def created(self, granules: int) -> None:
        self.ready_bytes += granules * self.granule_bytes

    def give_back(self, bytes_never_ready: int = 0, granules_released: int = 0,
                  granules_withdrawn: int = 0) -> None:  # fmt: skip
        self.ready_bytes -= granules_released * self.granule_bytes
        self.leased_bytes -= granules_released * self.granule_bytes + bytes_never_ready


def pool_over(driver: Any) -> Any:
    """Return a pool that has memory for all GRANULES granules."""
    from kvcached_core.geometry import Geometry
    from kvcached_core.worker.pool import ElasticPool

    per_granule = 8
    geometry = Geometry(
        PAGE_BYTES, PAGE_BYTES // per_granule, (0,), GRANULES * per_granule, per_granule, GRANULES
    )
    account: Any = Account(PAGE_BYTES)
    pool = ElasticPool(driver, geometry, account)
    while account.ready_bytes < account.wanted_bytes:
        pool.supply_thread.turn(time.monotonic())
    return pool


def child(rounds: int, skip_fences: bool) -> dict[str, Any]:
    """Run the rounds and return counts. With `skip_fences` the process must fail before the end."""
    import torch

    from kvcached_core.driver.registry import open_driver
    from kvcached_core.plan import Plan

    torch.cuda.init()
    driver: Any = Watched(open_driver("cuda"), skip_fences)
    pool = pool_over(driver)
    pages = pool.tensor.view(torch.int32).view(GRANULES, -1)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = int(torch.cuda.current_stream().cuda_stream)
    waits: list[float] = []
    sequence = before = 0
    while driver.in_flight < rounds:
        granule = 1 + sequence % (GRANULES - 1)
        pool.apply(Plan(sequence, (before,) if before else (), (granule,), 0), stream)
        for _ in range(LAUNCHES):
            torch.cuda._sleep(SPIN_CYCLES)
            pages[granule].add_(1)
        wrong.add_((pages[granule] != LAUNCHES).sum())
        driver.sentinel = torch.cuda.Event()
        driver.sentinel.record()
        began = time.perf_counter()
        while pool.background.unmap_deferred():
            pass
        waits.append(time.perf_counter() - began)
        sequence, before = sequence + 1, granule
    torch.cuda.synchronize()
    return {
        "in_flight": driver.in_flight,
        "at_rest": driver.at_rest,
        "wrong_values": int(wrong.item()),
        "fence_wait_seconds": waits[:: max(1, len(waits) // 1000)],
    }


def run_child(rounds: int, skip_fences: bool) -> tuple[int, str]:
    """Run in a child process; return its exit status and the last line that it printed."""
    command = [sys.executable, "-m", "benchmarks.micro.fence_stress", "--child", "--rounds", str(rounds)]
    command += ["--skip-fences"] if skip_fences else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return 124, f"not done after {CHILD_SECONDS} s"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode, lines[-1] if lines else ""


def child_main(rounds: int, skip_fences: bool) -> None:
    """Run the rounds, print the counts. Exit at once on an error: a broken CUDA context may hang at exit."""
    try:
        print(json.dumps(child(rounds, skip_fences)), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        os._exit(3)


def main() -> int:
    """Run the rounds and the control, write the result; return 1 if one of them did not end as it must."""
    parser = options_of.parser("micro.fence_stress", __doc__, required=False)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip-fences", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_main(options.rounds, options.skip_fences)
        return 0
    started = time.time()
    status, text = run_child(options.rounds, skip_fences=False)
    control, control_text = run_child(200, skip_fences=True)
    print(f"with fences: exit status {status}: {text[:200]}")
    print(f"without: exit status {control}: {control_text[:200]}")
    if status:
        return 1
    seen = json.loads(text)
    samples = {
        "unmaps_in_flight": [float(seen["in_flight"])],
        "unmaps_at_rest": [float(seen["at_rest"])],
        "wrong_values": [float(seen["wrong_values"])],
        "fence_wait_seconds": seen["fence_wait_seconds"],
        "control_exit_status": [float(control)],
    }
    if options.out:
        write(options.out, sys.argv, samples, {}, started, {"control": control_text[:300]})
    return 0 if control == 3 and not seen["wrong_values"] else 1


if __name__ == "__main__":
    sys.exit(main())
