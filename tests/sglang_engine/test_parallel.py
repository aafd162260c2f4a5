"""Two ranks with the same budget: outputs equal stock, and both ranks keep the budget under load."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import SEQUENTIAL, Answers, Prompt, differences
from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY
from devkit.report import record
from devkit.servers import Fleet, cores
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import SERVE, STOCK, SglangServer
from devkit.watch import owners, watching
from kvcached_core.ledger import Runtime, set_limit
from tests.engine.conftest import CAPACITY_BYTES, DEATH_SECONDS, ELASTIC, MIB, REST_SECONDS
from tests.sglang_engine.conftest import MODEL_FLAGS, PAGED, SETTINGS, TOKENS

pytestmark = pytest.mark.engine

NAME, TIGHT_BYTES = "pair", 8 * MIB
BOTH = [*MODEL_FLAGS, *PAGED, "--tp-size", "2"]
THREADS = {"SGLANG_CPU_OMP_THREADS_BIND": cores(2)}
CONVERGE_SECONDS = 1.0


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return the runtime directory of this file's servers."""
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def stock_pair(fleet: Fleet, model: Path, place: Path, prompts: list[Prompt]) -> Answers:
    """Return stock SGLang's answers with two ranks, which add numbers in another order than one rank."""
    server = SglangServer("sglang-stock-pair", model, place, [*BOTH, *TOKENS], THREADS | STOCK)
    with fleet.running(server):
        server.wait_ready()
        with SglangClient(server.url) as client:
            return client.answers(prompts, SEQUENTIAL)


@pytest.fixture(scope="module")
def pair(fleet: Fleet, model: Path, place: Path) -> Iterator[SglangServer]:
    """Return an elastic server of two ranks."""
    settings = SETTINGS | THREADS | {"KVCACHED_NAME": NAME, "KVCACHED_LAYOUT": "engine"}
    server = SglangServer("sglang-pair", model, place, [*BOTH, *ELASTIC, "--sleep-on-idle"], settings, SERVE)
    with fleet.running(server):
        server.wait_ready()
        yield server


def _held(place: Path) -> list[int]:
    """Return the bytes that each rank holds, by rank."""
    return [owner.ready_bytes for owner in sorted(owners(place, NAME), key=lambda owner: owner.rank)]


def _wait_until_beyond(place: Path, limit_bytes: int) -> None:
    until(lambda: max(_held(place)) > limit_bytes, 60, "the load has taken more than that")


def _seconds_until_within(place: Path, limit_bytes: int) -> float:
    def state() -> str:
        ranks = [(one.rank, one.created_granules, one.released_granules) for one in owners(place, NAME)]
        return f"both ranks are within the limit: held {_held(place)}, (rank, created, released) {ranks}"

    return until(lambda: max(_held(place)) <= limit_bytes, 30, state)


def test_i12_outputs_of_two_ranks_equal_stock(
    stock_pair: Answers, pair: SglangServer, place: Path, prompts: list[Prompt]
) -> None:
    with SglangClient(pair.url) as client, watching(place):
        answers = client.answers(prompts, SEQUENTIAL)
        assert client.reset_prefix_cache()
    assert not differences(answers, stock_pair)
    record("sglang.compared", len(answers))
    record("sglang.compared_tp2", len(answers))
    least = owners(place, NAME)[0].granule_bytes
    until(lambda: _held(place) == [least] * 2, REST_SECONDS, "both ranks are at rest")


def _load(client: SglangClient, prompts: list[Prompt], stop: threading.Event) -> list[Answers]:
    """Send all of these requests, again and again until told to stop."""
    found = [client.all_at_once(prompts, 24)]
    while not stop.is_set():
        found.append(client.all_at_once(prompts, 24))
    return found


def test_a_limit_holds_on_both_ranks_within_a_second_under_load(
    stock_pair: Answers, pair: SglangServer, place: Path, prompts: list[Prompt]
) -> None:
    runtime = Runtime.open(place)
    took, stop = [], threading.Event()
    with SglangClient(pair.url) as client, watching(place), ThreadPoolExecutor(1) as pool:
        load = pool.submit(_load, client, prompts[:80], stop)
        try:
            for limit_bytes in (TIGHT_BYTES, 2 * TIGHT_BYTES, TIGHT_BYTES):
                _wait_until_beyond(place, limit_bytes)
                set_limit(runtime, NAME, limit_bytes)
                took.append(_seconds_until_within(place, limit_bytes))
                set_limit(runtime, NAME, CAPACITY_BYTES)
        finally:
            stop.set()
        answers = load.result()
    print("limits held after " + ", ".join(f"{seconds:.2f} s" for seconds in took))
    assert not [wrong for each in answers for wrong in differences(each, stock_pair)]
    assert max(took) < CONVERGE_SECONDS, took
    record("sglang.compared", sum(map(len, answers)))
    record("sglang.limits_tp2", len(took))


def test_kill_9_of_one_rank_frees_what_both_held(pair: SglangServer, place: Path) -> None:
    _, second = pair.schedulers()
    os.kill(second, signal.SIGKILL)
    until(lambda: len(owners(place, NAME)) <= 1, DEATH_SECONDS, "the dead rank's slot is nobody's")
    pair.wait(60)
    until(lambda: not owners(place), DEATH_SECONDS, "nobody holds a slot")
    record("sglang.kills", 1)
