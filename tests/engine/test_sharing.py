"""Several owners of memory on one device: an engine short of memory waits, and none crashes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import SEQUENTIAL, Answers, Client, Prompt, differences, long_prompts
from devkit.models import smollm2
from devkit.polling import seen, until
from devkit.report import record
from devkit.servers import Fleet, Server, cores
from devkit.watch import owner, owners, watching
from kvcached_core.driver.base import MemoryInfo
from kvcached_core.ledger import Account, Runtime, set_limit
from tests.engine.conftest import CAPACITY_BYTES, DEATH_SECONDS, ELASTIC, HEADROOM_BYTES, MAIN, MIB
from tests.engine.neighbour import neighbour

pytestmark = pytest.mark.engine

REAL = "real"
_REAL_FLAGS = ["--max-model-len", "512"]


def _take(account: Account, leaving_bytes: int = 0) -> int:
    """Lease and create all free memory but `leaving_bytes`; return the number of granules."""
    wanted = CAPACITY_BYTES - HEADROOM_BYTES - leaving_bytes - MIB  # 1 MiB: the other engine's null granule
    granted = account.lease(wanted, MemoryInfo(CAPACITY_BYTES, CAPACITY_BYTES)) // MIB
    account.created(granted)
    return granted


def test_requests_wait_while_another_holds_the_device_and_then_finish(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    prompts = extra_prompts["long"]
    with watching(runtime), ThreadPoolExecutor(2) as pool:
        with neighbour(runtime, "outsider") as account:
            assert _take(account) > 0.9 * (CAPACITY_BYTES - HEADROOM_BYTES) / MIB
            requests = [pool.submit(client.ids, prompt) for prompt in prompts]
            until(lambda: owner(runtime, MAIN).demand_bytes > 0, 10, "the engine is refused memory")
            until(lambda: client.metric("vllm:num_requests_waiting") == 2, 10, "both requests wait")
            assert not any(request.done() for request in requests)
        answers = {prompt: request.result() for prompt, request in zip(prompts, requests, strict=True)}
    assert not differences(answers, stock)
    record("requests.compared", len(answers))


def test_requests_that_grow_while_another_holds_the_rest_are_preempted_and_finish(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    # Eight requests that begin with 8 MiB and end with 24 MiB; the other owner leaves them 14 MiB.
    prompts = extra_prompts["talkative"]
    before = client.metric("vllm:num_preemptions_total")
    with watching(runtime) as watch, ThreadPoolExecutor(8) as pool:
        with neighbour(runtime, "outsider") as account:
            assert _take(account, leaving_bytes=14 * MIB) > 0
            requests = [pool.submit(client.ids, prompt) for prompt in prompts]
            assert seen(lambda: client.metric("vllm:num_preemptions_total") > before, requests)
        answers = {prompt: request.result() for prompt, request in zip(prompts, requests, strict=True)}
    assert watch.peak_demand_bytes[MAIN] > 0
    assert not differences(answers, stock)
    record("requests.compared", len(answers))


def _real_prompts() -> list[Prompt]:
    return long_prompts(5, 150, 32)


def _real_answers(fleet: Fleet, folder: Path, runtime: Path) -> Answers:
    """Return stock vLLM's answers with the real model."""
    server = Server("real-stock", folder, runtime, _REAL_FLAGS, {"VLLM_PLUGINS": ""})
    with fleet.running(server):
        server.wait_ready()
        with Client(server.url) as client:
            return client.answers(_real_prompts())


def test_i1_a_second_engine_with_a_real_model_shares_the_device_and_ends_while_it_owes_memory(
    fleet: Fleet, client: Client, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    folder = smollm2()
    expected = _real_answers(fleet, folder, runtime)
    settings = {"KVCACHED_NAME": REAL, "KVCACHED_HOST_CAPACITY": str(CAPACITY_BYTES),
                "KVCACHED_HEADROOM": str(HEADROOM_BYTES), "KVCACHED_SPARE": "4MiB",
                "KVCACHED_LIMIT": "40MiB", "VLLM_CPU_OMP_THREADS_BIND": cores(2).split("|")[1]}  # fmt: skip
    server = Server("real", folder, runtime, [*_REAL_FLAGS, *ELASTIC], settings)
    with fleet.running(server):
        server.wait_ready()
        set_limit(Runtime.open(runtime), MAIN, 56 * MIB)
        with Client(server.url) as real, watching(runtime) as watch, ThreadPoolExecutor(1) as pool:
            beside = pool.submit(client.answers, prompts[:80], SEQUENTIAL)
            assert "Paris" in real.chat("What is the capital of France?", 24)
            assert not differences(real.answers(_real_prompts()), expected)
            assert not differences(beside.result(), stock)
            assert real.rpc("kvcached_check") == client.rpc("kvcached_check") == [None]
        assert watch.peak_ready_bytes[MAIN] <= 56 * MIB
        assert watch.peak_ready_bytes[REAL] <= 40 * MIB
        assert "waste 0.0%" in server.text(), "pages on the host are multiples of the block"
        record("requests.compared", len(beside.result()) + len(expected))

        set_limit(Runtime.open(runtime), REAL, MIB)  # less than it holds: it owes memory from now on
        server.terminate(30)
        # older versions of vLLM do not wait for processes that they kill
        until(lambda: not owners(runtime, REAL), DEATH_SECONDS, "the ledger is clean")
