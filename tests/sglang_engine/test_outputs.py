"""I12: an elastic SGLang gives the same answers as stock, with pages of one slot and of several slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from devkit.client import CONCURRENCY, SEQUENTIAL, Answers, Prompt, differences
from devkit.report import record
from devkit.servers import Fleet
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import SglangServer
from devkit.watch import watching
from kvcached_core.ledger import Runtime, set_limit, wait_until_holds
from tests.engine.conftest import MAIN, MIB
from tests.sglang_engine.conftest import MODEL_FLAGS, PAGED, SETTINGS, TOKENS

pytestmark = pytest.mark.engine


def test_i12_the_default_backend_is_stock_and_stock_agrees_with_itself(
    fleet: Fleet, model: Path, stock: Answers, prompts: list[Prompt], tmp_path: Path
) -> None:
    flags = [*MODEL_FLAGS, *PAGED, *TOKENS, "--kv-cache-backend", "default"]
    server = SglangServer("sglang-default", model, tmp_path / "run", flags, {"ENABLE_KVCACHED": "true"})
    with fleet.running(server):
        server.wait_ready()
        with SglangClient(server.url) as client:
            wrong = differences(client.all_at_once(prompts, CONCURRENCY), stock)
        assert not (tmp_path / "run").exists(), "a server with the default backend opened a ledger"
    record("sglang.control_mismatches", len(wrong))
    record("sglang.control_compared", len(prompts))
    assert not wrong


def test_i12_outputs_equal_stock_in_turn_together_and_with_shared_prefixes(
    elastic: SglangServer, client: SglangClient, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    with watching(runtime):
        answers = client.answers(prompts, SEQUENTIAL)
    assert not differences(answers, stock)
    assert "all layers of a token together" in elastic.text()
    record("sglang.compared", len(answers))


def test_i12_outputs_equal_stock_with_a_page_for_each_token_and_each_layers_keys_and_values_together(
    fleet: Fleet, model: Path, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    more = {"KVCACHED_NAME": "tokens", "ENABLE_KVCACHED": "true", "KVCACHED_LAYOUT": "layer"}
    settings = SETTINGS | more
    server = SglangServer("sglang-tokens", model, runtime, MODEL_FLAGS, settings)
    with fleet.running(server):
        server.wait_ready()
        with SglangClient(server.url) as client, watching(runtime) as watch:
            answers = client.answers(prompts, SEQUENTIAL)
            assert client.state()["memory_usage"]["token_capacity"] > 20_000
        assert watch.peak_used_bytes["tokens"] > 4 * MIB
    assert "keys and values of a layer together" in server.text()
    assert not differences(answers, stock)
    record("sglang.compared", len(answers))


def test_i12_outputs_equal_stock_while_requests_are_retracted(
    client: SglangClient, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    # Eight requests that begin with 1 MiB and end with 3 MiB, in room for 9: some must be retracted.
    opened = Runtime.open(runtime)
    changes = set_limit(opened, MAIN, 10 * MIB)
    assert all(outcome.holds for outcome in wait_until_holds(opened, changes, 5.0))
    with watching(runtime) as watch:
        answers = client.answers(extra_prompts["talkative"])
    assert watch.peak_ready_bytes[MAIN] <= 10 * MIB
    assert not differences(answers, stock)
    record("sglang.compared", len(answers))
