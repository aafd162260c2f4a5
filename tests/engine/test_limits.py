"""Requests that do not fit: a request that can never fit ends with an error, other requests wait."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import pytest

from devkit.client import Answers, Client, Prompt, differences, long_prompts
from devkit.polling import seen
from devkit.report import record
from kvcached_core.ledger import Runtime, set_limit, wait_until_holds
from tests.engine.conftest import ATTEMPTS, MAIN, MIB

pytestmark = pytest.mark.engine


def _limit(runtime: Path, limit_bytes: int) -> None:
    opened = Runtime.open(runtime)
    outcomes = wait_until_holds(opened, set_limit(opened, MAIN, limit_bytes), 5.0)
    assert all(outcome.holds for outcome in outcomes)


def test_a_request_that_can_never_fit_gets_an_error_and_the_server_goes_on(
    client: Client,
    runtime: Path,
    stock: Answers,
    prompts: list[Prompt],
    extra_prompts: dict[str, list[Prompt]],
) -> None:
    _limit(runtime, 6 * MIB)  # 11 blocks beside the null block; the prompt alone needs 15
    with ThreadPoolExecutor(4) as pool:
        hopeless = pool.submit(client.complete, extra_prompts["long"][0])
        others = client.answers(prompts[:8])
    assert hopeless.result().status_code == HTTPStatus.INTERNAL_SERVER_ERROR
    assert not differences(others, stock)


def test_a_request_that_outgrows_the_limit_gets_an_error_and_the_server_goes_on(
    client: Client, runtime: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    _limit(runtime, 6 * MIB)
    (growing,) = long_prompts(1, 1380, 64)  # 11 blocks, the last of them full
    assert client.complete(growing).status_code == HTTPStatus.INTERNAL_SERVER_ERROR
    assert not differences(client.answers(prompts[:4]), stock)


def test_i10_a_long_prompt_waits_for_memory_and_is_then_admitted(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    _limit(runtime, 9 * MIB)  # 17 blocks beside the null block: not 15 for one and 2 for each of the others
    long, talkative = extra_prompts["long"][0], extra_prompts["talkative"][:2]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(ATTEMPTS):  # the other requests may end before the long prompt is sent
            requests = {prompt: pool.submit(client.ids, prompt) for prompt in talkative}
            both_ran = seen(lambda: client.metric("vllm:num_requests_running") == 2, [*requests.values()])
            requests[long] = pool.submit(client.ids, long)
            waited = seen(lambda: client.metric("vllm:num_requests_waiting") == 1, [*requests.values()])
            answers = {prompt: request.result() for prompt, request in requests.items()}
            assert not differences(answers, stock)
            record("requests.compared", len(answers))
            if both_ran and waited:
                return
            assert client.reset_prefix_cache()
    raise AssertionError(f"the long prompt was never seen to wait while others ran, {ATTEMPTS} times over")
