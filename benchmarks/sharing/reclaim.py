"""Measure how fast another owner gets 10 GiB that one engine holds as prefix cache, in many rounds.

    python -m benchmarks.sharing.reclaim --out benchmarks/results/reclaim.json

The giver is vLLM with a model of the shape of Llama-8B; real requests fill all leasable memory with its
prefix cache. The taker is this process: an elastic pool on the same ledger that asks for 640 granules of 16
MiB at once, and gives them back while the giver fills its cache again. In half of the rounds the giver has
been idle for 5 seconds, in the other half it decodes all the time. Ledger fields, read every 0.2 ms, show the
stages of a round; all times count from the moment the taker asks. The exit status is 1 if a round failed, but
not if a goal was missed. Takes 7 minutes on an H100. Without a GPU (or with `--host --model FOLDER`) it runs
on the CPU with small sizes.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib import engines
from benchmarks.lib import options as options_of
from benchmarks.lib.engines import Engine, EngineDiedError, Scale
from benchmarks.lib.ledger_watch import Trace, Word, owner_named
from benchmarks.lib.runtime import own_runtime
from benchmarks.lib.taker import POLL_SECONDS, Taker, edit_seconds
from benchmarks.sharing import reclaim_report
from benchmarks.sharing.reclaim_round import (
    GIVER_WORDS,
    TAKER_WORDS,
    Round,
    Row,
    driver_error_bytes,
    measure,
    token_rates,
)
from devkit.polling import until
from kvcached_core.driver.base import Driver
from kvcached_core.driver.registry import open_driver
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger import OwnerSnapshot, Runtime
from kvcached_core.ledger.file.storage import LedgerFile

TAKEN_UNITS, LEASABLE_UNITS = 10, 16
START_SECONDS, FILL_SECONDS, ROUND_SECONDS = 200.0, 90.0, 5.0
SETTLE_SECONDS = 1.3  # for a second, memory that the giver waited for is not reclaimed
WINDOW_SECONDS = 0.5  # the giver's tokens are counted this long before and after the taker's request
_TRACE_SECONDS = 0.01
HOLD_SECONDS = 0.1  # the taker keeps the memory at least this long
IDLE_SHARE = 0.65  # rounds with an idle giver get this share of the remaining time
BACKGROUND_REQUESTS, BACKGROUND_PROMPT = (
    8,
    128,
)  # requests of a busy giver that decode all the time; tokens of a prompt
BACKGROUND_UNITS = 2  # KV cache that these requests hold at most


class Bench:
    """The giver, the taker and the rounds. `samples` grows with every round."""

    def __init__(self, scale: Scale, logs: Path, runtime: Runtime, give_up_at: float) -> None:
        self.scale = scale
        self.rounds: dict[str, list[Round]] = {"idle": [], "busy": []}
        self.samples: dict[str, list[float]] = {}
        self.notes: dict[str, Any] = {"failed_rounds": []}
        self.give_up_at = give_up_at
        self._logs = logs
        self._runtime = runtime
        self._seeds = itertools.count(1)
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def open(self) -> None:
        """Start the giver, enter the ledger beside it, and fill all leasable memory with its cache."""
        unit, on_host = self.scale.gib, self.scale.on_host
        if not on_host:
            import torch

            torch.cuda.init()
        self.driver: Driver = open_driver(self.scale.driver, 0, 50 * unit if on_host else 0)
        total = self.driver.memory().total_bytes
        headroom = total - self.scale.private_bytes - LEASABLE_UNITS * unit
        options = {"headroom": str(headroom)} | ({"host_capacity": str(total)} if on_host else {})
        self.giver = Engine("giver", self.scale, self._logs, options)
        self.say(f"the giver serves after {self.giver.wait_ready(START_SECONDS):.1f} s")
        like = self.owner()
        granules = TAKEN_UNITS * unit // like.page_bytes
        self.samples |= edit_seconds(self.driver, like.page_bytes, granules // 5)
        self.taker = Taker(
            self._runtime, self.driver, headroom, like.page_bytes, like.blocks_per_granule, granules
        )
        self.file = LedgerFile(self._runtime.device(self.driver.identity().uuid).ledger)
        self.words = [Word(like.slot, name) for name in GIVER_WORDS]
        self.words += [Word(self.taker.account.slot, name) for name in TAKER_WORDS]
        self.trace = Trace(self.file, self.words)
        self.notes |= {"unit_bytes": unit, "granules": granules, "page_bytes": like.page_bytes,
                       "giver_blocks": like.block_count}  # fmt: skip
        self.full_bytes = engines.fill(self.giver, self.owner, self.scale, self._seeds, FILL_SECONDS)
        self.say(f"its cache has filled what can be leased: {self.full_bytes / unit:.2f}")

    def owner(self) -> OwnerSnapshot:
        """Return the giver as the ledger shows it."""
        return owner_named(self._runtime, "giver")

    def refill(self) -> None:
        """Fill the giver's cache again, with the memory that the taker gave back."""
        missing = self.full_bytes - engines.content_bytes(self.owner())
        length = self.giver.info["max_model_len"] // 2
        for _ in range(3):
            if missing > self.scale.gib // 4:
                count = self.giver.requests_in(missing, length, self.owner())
                self.giver.result(self.giver.burst(count, length, 1, next(self._seeds)), FILL_SECONDS)
            missing = self.full_bytes - engines.content_bytes(self.owner())
        if self.full_bytes - missing < (TAKEN_UNITS + 1) * self.scale.gib:
            raise TimeoutError(f"the giver's cache does not fill again: {missing} bytes are missing")

    def check_driver(self) -> None:
        """Compare the driver's free memory with the ledger's fields, in a round that does not count."""
        rows: list[Row] = []

        def look() -> bool:
            free_bytes = self.driver.memory().free_bytes
            row = Row(time.monotonic(), *(self.file.get(*word) for word in self.words))
            rows.append(row._replace(free=free_bytes))
            return self.taker.held > self.taker.granules

        look()
        said_at = self.taker.wish()
        until(look, ROUND_SECONDS, lambda: f"{self.taker.held} granules came", POLL_SECONDS)
        look()
        self.notes["driver_check"] = driver_error_bytes(rows, said_at)
        self.say(f"the driver's free memory against the words: {self.notes['driver_check']}")
        self.taker.give_back(ROUND_SECONDS)

    def play(self, kind: str) -> None:
        """Run one round. Raises ValueError, TimeoutError, EngineDiedError."""
        cached = self.owner().cached_bytes
        self.trace.begin()
        time.sleep(0.01)
        said_at = self.taker.wish()
        try:
            self.taker.wait_for_all(ROUND_SECONDS)
            window_seconds = WINDOW_SECONDS if kind == "busy" else HOLD_SECONDS
            # The taker may see the last granules earlier than the trace.
            time.sleep(max(_TRACE_SECONDS, said_at + window_seconds - time.monotonic()))
        finally:
            traced = self.trace.end()
        rows = [Row(at, *values) for at, values in traced.rows]
        one = measure(rows, said_at, self.taker.granules * self.taker.page_bytes, self.scale.gib)
        rates = {}
        if kind == "busy":
            steps = self.giver.result(self.giver.ask("steps"), ROUND_SECONDS)["steps"]
            rates = token_rates(steps, said_at, WINDOW_SECONDS)
        self.rounds[kind].append(
            Round(one | {"cached": cached}, rates, rows, said_at, traced.widest_gap_seconds)
        )

    def rounds_of(self, kind: str, count: int, pause_seconds: float, give_up_at: float) -> None:
        """Run up to `count` rounds, until the time is over or the giver is dead."""
        for number in range(count):
            if time.monotonic() > give_up_at:
                self.say(f"no time for more rounds with the giver {kind}: {number} of {count}")
                return
            try:
                self.refill()
                time.sleep(pause_seconds)
                self.play(kind)
                one = self.rounds[kind][-1].seconds
                self.say(f"{kind} {number}: free {1e3 * one['all_free']:.1f} ms, first GiB "
                         f"{1e3 * one['first_gib']:.1f} ms, all {1e3 * one['all_ready']:.1f} ms")  # fmt: skip
            except EngineDiedError:
                raise
            except (KVCachedError, ValueError, TimeoutError) as error:
                self.notes["failed_rounds"].append(f"{kind} {number}: {type(error).__name__}: {error}")
                self.say(f"failed: {self.notes['failed_rounds'][-1]}")
            self.taker.give_back(ROUND_SECONDS)

    def begin_background(self) -> None:
        """Keep the giver decoding from now on."""
        tokens = self.giver.tokens_in(BACKGROUND_UNITS * self.scale.gib // BACKGROUND_REQUESTS, self.owner())
        what = {
            "count": BACKGROUND_REQUESTS,
            "length": BACKGROUND_PROMPT,
            "generate": tokens - BACKGROUND_PROMPT,
        }
        self.giver.result(self.giver.ask("background", **what), ROUND_SECONDS)

    def run(self, count: int, idle_seconds: float, save: Callable[[], None]) -> None:
        """Run all rounds."""
        self.open()
        time.sleep(SETTLE_SECONDS)
        if not self.scale.on_host:  # the host driver does not see the pages of other processes
            self.check_driver()
        left = self.give_up_at - time.monotonic()
        self.rounds_of("idle", count, idle_seconds, time.monotonic() + IDLE_SHARE * left)
        save()
        self.begin_background()
        self.rounds_of("busy", count, SETTLE_SECONDS, self.give_up_at)

    def close(self) -> None:
        """End the giver and leave the ledger."""
        if hasattr(self, "giver"):
            self.giver.kill()
        if hasattr(self, "taker"):
            with contextlib.suppress(KVCachedError):
                self.file.close()
                self.taker.close()
        if hasattr(self, "trace"):
            self.trace.close()


def main() -> int:
    """Run the rounds, write the result and print the verdicts."""
    parser = options_of.parser("sharing.reclaim", __doc__)
    options_of.add_engines(parser, "reclaim")
    parser.add_argument("--rounds", type=int, default=30, help="rounds with an idle and with a busy giver")
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    options_of.add_time_limit(parser, 540.0)
    options = parser.parse_args()
    started = time.time()
    with own_runtime() as runtime:
        give_up_at = time.monotonic() + options.most_seconds
        scale = engines.scale(options.host, options.model)
        bench = Bench(scale, options.logs, runtime, give_up_at)

        def save() -> None:
            reclaim_report.save(options.out, bench.rounds, bench.samples, bench.notes, started)

        try:
            bench.run(options.rounds, options.idle_seconds, save)
        except Exception as error:
            bench.notes["failure"] = f"{type(error).__name__}: {error}"
            bench.say(f"ended early: {bench.notes['failure']}")
        finally:
            bench.close()
            save()
    print(reclaim_report.table(bench.rounds, bench.samples))
    complete = all(len(rounds) == options.rounds for rounds in bench.rounds.values())
    return 0 if complete and "failure" not in bench.notes else 1


if __name__ == "__main__":
    sys.exit(main())
