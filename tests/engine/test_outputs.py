"""I12 on one worker: an elastic engine gives the same answers as stock vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from devkit.client import SEQUENTIAL, Answers, Client, Prompt, differences
from devkit.report import record
from devkit.servers import Fleet, Server
from devkit.watch import watching
from kvcached_core.ledger import Runtime, set_limit, wait_until_holds
from tests.engine.conftest import MAIN, MIB, MODEL_FLAGS

pytestmark = pytest.mark.engine


def test_i12_the_default_backend_is_stock_and_stock_agrees_with_itself(
    fleet: Fleet, model: Path, stock: Answers, prompts: list[Prompt], tmp_path: Path
) -> None:
    flags = [*MODEL_FLAGS, "--kv-cache-backend", "default"]
    server = Server("default", model, tmp_path / "run", flags, {"ENABLE_KVCACHED": "true"})
    with fleet.running(server):
        server.wait_ready()
        with Client(server.url) as client:
            wrong = differences(client.answers(prompts, SEQUENTIAL), stock)
        assert not (tmp_path / "run").exists(), "an engine with the default backend opened a ledger"
    print(f"control: stock differs from itself in {len(wrong)} of {len(prompts)} requests")
    record("requests.control_mismatches", len(wrong))
    record("requests.control_compared", len(prompts))
    assert not wrong


def test_i12_outputs_equal_stock_in_turn_together_and_with_shared_prefixes(
    client: Client, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    with watching(runtime):
        answers = client.answers(prompts, SEQUENTIAL)
    assert not differences(answers, stock)
    assert client.rpc("kvcached_check") == [None]
    record("requests.compared", len(answers))


def test_i12_outputs_equal_stock_while_requests_are_preempted(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    # Eight requests that begin with 2 blocks and end with 6, in room for 15: some must be preempted.
    opened = Runtime.open(runtime)
    changes = set_limit(opened, MAIN, 8 * MIB)
    assert all(outcome.holds for outcome in wait_until_holds(opened, changes, 5.0))
    before = client.metric("vllm:num_preemptions_total")
    with watching(runtime) as watch:
        answers = client.answers(extra_prompts["talkative"])
    preemptions = client.metric("vllm:num_preemptions_total") - before
    assert preemptions > 0
    assert watch.peak_ready_bytes[MAIN] <= 8 * MIB
    assert not differences(answers, stock)
    record("requests.compared", len(answers))
    record("requests.preemptions", int(preemptions))
