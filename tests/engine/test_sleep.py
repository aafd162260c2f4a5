"""Sleep mode of a real server: others can use its KV memory, and after waking it answers like stock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from devkit.client import Answers, Client, Prompt, differences
from devkit.polling import seen, until
from devkit.servers import Server
from devkit.watch import is_at_rest, owner, watching
from kvcached_core.driver.base import MemoryInfo
from kvcached_core.ledger import Account
from tests.engine.conftest import ATTEMPTS, CAPACITY_BYTES, HEADROOM_BYTES, MAIN, MIB
from tests.engine.neighbour import neighbour

pytestmark = pytest.mark.engine

LEFT_BYTES = 4 * MIB  # more than the sleeping engine's null granule


def _take(account: Account, size_bytes: int) -> int:
    """Lease and create this much memory; return the bytes."""
    granted = account.lease(size_bytes, MemoryInfo(CAPACITY_BYTES, CAPACITY_BYTES))
    account.created(granted // MIB)
    return granted


def _answer_as_stock(client: Client, prompts: list[Prompt], stock: Answers) -> None:
    assert differences(client.answers(prompts), stock) == []
    assert client.rpc("kvcached_check") == [None]


@pytest.mark.parametrize("level", [1, 2])
def test_another_engine_has_all_the_memory_of_one_that_sleeps(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]], level: int
) -> None:
    cached = extra_prompts["cached"]
    most_bytes = CAPACITY_BYTES - HEADROOM_BYTES - LEFT_BYTES
    with watching(runtime):
        _answer_as_stock(client, cached, stock)
        assert owner(runtime, MAIN).cached_bytes > MIB
        client.sleep(level)
        assert is_at_rest(runtime, MAIN), "when the call returns"
        assert client.is_sleeping()
        until(lambda: owner(runtime, MAIN).cached_bytes == 0, 5, "the scheduler has heard of it")
        with neighbour(runtime, "other") as other, ThreadPoolExecutor(1) as pool:
            assert _take(other, most_bytes) == most_bytes
            waking = pool.submit(client.wake_up)
            until(lambda: owner(runtime, MAIN).starting_bytes > 0, 5, "it waits for its floor")
            assert not waking.done() and is_at_rest(runtime, MAIN)
            other.give_back(granules_released=other.ready_bytes // MIB)
            assert waking.result(30).is_success
            assert not client.is_sleeping()
            _answer_as_stock(client, cached, stock)


def test_an_engine_stays_asleep_if_floors_leave_no_room(
    elastic: Server, client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    client.sleep()
    with neighbour(runtime, "other", CAPACITY_BYTES - HEADROOM_BYTES - owner(runtime, MAIN).floor_applied):
        assert client.wake_up().is_success, "there is just room"
        client.sleep()
    floor_bytes = owner(runtime, MAIN).floor_applied
    with neighbour(runtime, "other", CAPACITY_BYTES - floor_bytes):
        with Client(elastic.url) as asking:  # the server ends the connection
            assert asking.wake_up().status_code == 500, "headroom is nobody's"
        assert client.is_sleeping() and is_at_rest(runtime, MAIN)
    assert client.wake_up().is_success
    _answer_as_stock(client, extra_prompts["long"], stock)


def test_requests_kept_during_sleep_are_answered_as_by_stock(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    talkative = extra_prompts["talkative"]
    with watching(runtime), ThreadPoolExecutor(len(talkative)) as pool:
        for _ in range(ATTEMPTS):  # the requests may end before the engine falls asleep
            requests = {prompt: pool.submit(client.ids, prompt) for prompt in talkative}
            seen(lambda: client.metric("vllm:num_requests_running") > 0, [*requests.values()])
            client.sleep(mode="keep")
            rests, ended = is_at_rest(runtime, MAIN), [request.done() for request in requests.values()]
            weights, is_asleep, cache = (
                client.wake_up("weights"),
                client.is_sleeping(),
                client.wake_up("kv_cache"),
            )
            answers = {prompt: request.result(120) for prompt, request in requests.items()}
            assert rests and weights.is_success and cache.is_success
            assert is_asleep and not client.is_sleeping()
            assert differences(answers, stock) == []
            if not all(ended):
                return
    raise AssertionError(f"no request was still under way when it fell asleep, {ATTEMPTS} times over")


@pytest.mark.skipif(Version(version("vllm")) < Version("0.31"), reason="vLLM 0.31 is the first to do it")
def test_a_paused_engine_can_release_its_cache_alone(
    client: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    cached = extra_prompts["cached"]
    _answer_as_stock(client, cached, stock)
    client.sleep(0)
    client.release_kv_cache_memory()
    assert is_at_rest(runtime, MAIN)
    assert client.wake_up().is_success
    _answer_as_stock(client, cached, stock)
