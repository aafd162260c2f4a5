"""Many clients, aborted requests and a constantly changing limit, all at once for a minute."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import CONCURRENCY, Answers, Client, Prompt, differences
from devkit.polling import until
from devkit.report import record
from devkit.watch import is_at_rest, watching
from kvcached_core.ledger import Runtime, set_limit
from tests.engine.conftest import CAPACITY_BYTES, MAIN, MIB, REST_SECONDS

pytestmark = pytest.mark.engine

SECONDS, ABORTED, LIMIT_SECONDS, CHECK_SECONDS = 60.0, 0.3, 0.4, 3.0
TIGHT_BYTES, WIDE_BYTES = 12 * MIB, 80 * MIB


class _Load:
    """Clients that send requests, and abort some, until told to stop."""

    def __init__(self, client: Client, prompts: list[Prompt], stock: Answers) -> None:
        self._client = client
        self._prompts = prompts
        self._stock = stock
        self.stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, seed: int) -> None:
        """Run one client. Any error but the client's own abort fails the test."""
        source = random.Random(seed)
        while not self.stop.is_set():
            prompt = source.choice(self._prompts)
            if source.random() < ABORTED:
                under_way = self._client.abort(prompt, source.randint(1, max(1, prompt.max_tokens // 2)))
                self.counts["aborted" if under_way else "ended before the abort"] += 1
            else:
                self.wrong += differences({prompt: self._client.ids(prompt)}, self._stock)
                self.counts["completed"] += 1

    def disturb(self, runtime: Path) -> None:
        """Move the limit up and down, and make the workers check their invariants."""
        opened, next_check = Runtime.open(runtime), time.monotonic()
        for limit_bytes in itertools.cycle((TIGHT_BYTES, WIDE_BYTES)):
            if self.stop.wait(LIMIT_SECONDS):
                return
            set_limit(opened, MAIN, limit_bytes)
            self.counts["limits"] += 1
            if time.monotonic() >= next_check:
                assert self._client.rpc("kvcached_check") == [None]
                self.counts["checks"] += 1
                next_check = time.monotonic() + CHECK_SECONDS


def test_stress_all_invariants_hold_and_outputs_equal_stock(
    client: Client, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    load = _Load(client, prompts, stock)
    with watching(runtime) as watch, ThreadPoolExecutor(CONCURRENCY + 1) as pool:
        threads = [pool.submit(load.run, seed) for seed in range(CONCURRENCY)]
        threads.append(pool.submit(load.disturb, runtime))
        end = time.monotonic() + SECONDS
        try:
            until(lambda: time.monotonic() > end or any(t.done() for t in threads), SECONDS + 1, "the end")
        finally:
            load.stop.set()
        for thread in threads:
            thread.result()
    print(f"stress: {dict(load.counts)}, {watch.samples} pictures of the ledger")
    assert not load.wrong, load.wrong[:5]
    assert load.counts["aborted"] > 0.15 * load.counts.total()
    assert load.counts["limits"] > 60
    set_limit(Runtime.open(runtime), MAIN, CAPACITY_BYTES)
    until(client.reset_prefix_cache, REST_SECONDS, "the last aborted request is gone")
    until(lambda: is_at_rest(runtime, MAIN), REST_SECONDS, "memory is back to the idle level")
    assert client.rpc("kvcached_check") == [None]
    record("stress.requests", load.counts["completed"] + load.counts["aborted"])
    record("stress.limits", load.counts["limits"])
