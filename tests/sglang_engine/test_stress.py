"""Everything at once: 120 requests at a time, shared prefixes, aborts, and a limit that never rests."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcached_core.ledger import Runtime, set_limit
from tests.engine.client import Answers, Prompt, differences
from tests.engine.conftest import CAPACITY_BYTES, MAIN, MIB, REST_SECONDS
from tests.engine.server import until
from tests.engine.watch import is_at_rest, watching
from tests.report import record
from tests.sglang_engine.client import SglangClient
from tests.sglang_engine.server import SglangServer

pytestmark = pytest.mark.engine

AT_ONCE, LIMIT_SECONDS = 120, 1.0
LIMITS_BYTES = (12 * MIB, 160 * MIB, 10 * MIB, 40 * MIB)  # the least is one request of the maximum length


def _disturb(runtime: Path, stop: threading.Event, counts: Counter[str]) -> None:
    """Move the limit every second."""
    opened = Runtime.open(runtime)
    for limit_bytes in itertools.cycle(LIMITS_BYTES):
        if stop.wait(LIMIT_SECONDS):
            return
        set_limit(opened, MAIN, limit_bytes)
        counts["limits"] += 1


def test_stress_all_invariants_hold_and_outputs_equal_stock(
    elastic: SglangServer, client: SglangClient, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    stop, counts = threading.Event(), Counter[str]()
    with watching(runtime) as watch, ThreadPoolExecutor(AT_ONCE + 8) as pool:
        disturber = pool.submit(_disturb, runtime, stop, counts)
        try:
            answers = [pool.submit(client.ids, prompt) for prompt in prompts]
            aborts = [pool.submit(client.abort, prompt, 2) for prompt in prompts[::5]]
            found = {prompt: each.result() for prompt, each in zip(prompts, answers, strict=True)}
            counts["aborted"] = sum(each.result() for each in aborts)
        finally:
            stop.set()
        disturber.result()
    print(f"stress: {dict(counts)}, {watch.samples} pictures of the ledger")
    assert not differences(found, stock)
    assert counts["limits"] >= 4 and counts["aborted"] > 0
    set_limit(Runtime.open(runtime), MAIN, CAPACITY_BYTES)
    until(client.reset_prefix_cache, REST_SECONDS, "the last aborted request is gone")
    until(lambda: is_at_rest(runtime, MAIN), REST_SECONDS, "memory is back to the idle level")
    assert elastic.alive, "SGLang's own checks, strict in these tests, end a server that leaks"
    record("sglang.compared", len(found))
    record("sglang.stress_requests", len(found) + counts["aborted"])
    record("sglang.stress_limits", counts["limits"])
