"""120 requests at a time, shared prefixes, aborts and a constantly changing limit, all at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import Answers, Prompt, differences
from devkit.polling import until
from devkit.report import record
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import SglangServer
from devkit.watch import is_at_rest, watching
from tests.engine.conftest import CAPACITY_BYTES, MAIN, MIB, REST_SECONDS
from tests.sglang_engine.limits import moving_limit

pytestmark = pytest.mark.engine

AT_ONCE, LEAST_MOVES = 120, 4
LIMITS_BYTES = (12 * MIB, 80 * MIB, 10 * MIB, 40 * MIB)  # the least is one request of the maximum length


def test_stress_all_invariants_hold_and_outputs_equal_stock(
    elastic: SglangServer, client: SglangClient, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    found: list[Answers] = []
    aborted = 0
    with (
        watching(runtime) as watch,
        ThreadPoolExecutor(AT_ONCE + 8) as pool,
        moving_limit(runtime, MAIN, LIMITS_BYTES, CAPACITY_BYTES) as limit,
    ):
        while limit.made < LEAST_MOVES:  # one pass on a slow machine
            answers = [pool.submit(client.ids, prompt) for prompt in prompts]
            aborts = [pool.submit(client.abort, prompt, 2) for prompt in prompts[::5]]
            found.append({prompt: each.result() for prompt, each in zip(prompts, answers, strict=True)})
            aborted += sum(each.result() for each in aborts)
    compared = sum(map(len, found))
    print(f"stress: {compared} compared, {aborted} aborted, {limit.made} limits, {watch.samples} pictures")
    assert not [wrong for each in found for wrong in differences(each, stock)]
    assert aborted > 0
    until(client.reset_prefix_cache, REST_SECONDS, "the last aborted request is gone")
    until(lambda: is_at_rest(runtime, MAIN), REST_SECONDS, "memory is back to the idle level")
    assert elastic.alive, "SGLang's own checks, strict in these tests, end a server that leaks"
    record("sglang.compared", compared)
    record("sglang.stress_requests", compared + aborted)
    record("sglang.stress_limits", limit.made)
