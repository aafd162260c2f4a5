"""Two engines on one budget: memory goes to the engine with requests, and no answer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from devkit.client import Answers, Client, Prompt, differences
from devkit.polling import seen, until
from devkit.process_groups import kill_group
from devkit.report import record
from devkit.servers import Fleet, Server, cores
from devkit.watch import is_at_rest, owner, owners, watching
from tests.engine.conftest import (
    CAPACITY_BYTES,
    ELASTIC,
    HEADROOM_BYTES,
    MAIN,
    MIB,
    MODEL_FLAGS,
    REST_SECONDS,
    SETTINGS,
    KeptAlive,
)

pytestmark = pytest.mark.engine

OTHER = "other"
BUDGET_BYTES = CAPACITY_BYTES - HEADROOM_BYTES
HALF_BYTES, GOT_BYTES = BUDGET_BYTES // 2, BUDGET_BYTES * 2 // 3
GIVE_SECONDS = 10.0  # a hundred times what an idle machine needs


@pytest.fixture(scope="module")
def _second(fleet: Fleet, model: Path, runtime: Path) -> Iterator[KeptAlive[Server]]:
    """Return the holder of the second engine, which starts when first needed, on the free CPU core."""
    threads = {"VLLM_CPU_OMP_THREADS_BIND": cores(2).split("|")[1]}
    settings = SETTINGS | threads | {"KVCACHED_NAME": OTHER}
    flags = [*MODEL_FLAGS, *ELASTIC]
    with closing(KeptAlive(fleet, lambda: Server(OTHER, model, runtime, flags, settings))) as kept:
        yield kept


@pytest.fixture
def second(_second: KeptAlive[Server], client: Client, runtime: Path) -> Server:
    """Return the second engine beside the main one, both at rest."""
    server = _second.ready()
    with Client(server.url) as other:
        until(other.reset_prefix_cache, REST_SECONDS, "no request runs any more")
    until(lambda: is_at_rest(runtime, OTHER), REST_SECONDS, "an engine that is left alone is at rest")
    return server


@pytest.fixture
def other(second: Server) -> Iterator[Client]:
    """Return a client of the second engine."""
    with Client(second.url) as client:
        yield client


class Burst:
    """Prompts that are sent at the same time."""

    def __init__(self, pool: ThreadPoolExecutor, client: Client, prompts: Sequence[Prompt]) -> None:
        self._requests = {prompt: pool.submit(client.ids, prompt) for prompt in prompts}

    def sees(self, condition: Callable[[], bool]) -> bool:
        """Say whether the condition holds at some time before the last answer, even on a slow machine."""
        return seen(condition, list(self._requests.values()))

    def answers(self) -> Answers:
        """Wait for the answers."""
        return {prompt: request.result() for prompt, request in self._requests.items()}


def test_i1_to_i4_hold_in_bursts_out_of_phase_and_each_engine_gets_more_than_half(
    client: Client, other: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    burst = extra_prompts["burst"]
    found: list[Answers] = []
    with watching(runtime) as watch, ThreadPoolExecutor(2 * len(burst)) as pool:
        for name, one in ((MAIN, client), (OTHER, other)):
            found.append(Burst(pool, one, burst).answers())
            assert watch.peak_used_bytes[name] > HALF_BYTES, f"the burst on {name} takes what it needs"
        both = [Burst(pool, one, burst) for one in (client, other)]
        found += [each.answers() for each in both]
        assert client.rpc("kvcached_check") == other.rpc("kvcached_check") == [None]
    assert not [wrong for answers in found for wrong in differences(answers, stock)]
    record("requests.compared", sum(map(len, found)))


def test_an_idle_engine_full_of_cache_gives_it_to_a_busy_one_and_computes_it_again(
    client: Client, other: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    burst = extra_prompts["burst"]
    with watching(runtime), ThreadPoolExecutor(len(burst)) as pool:
        Burst(pool, client, burst).answers()
        until(lambda: not owner(runtime, MAIN).busy, GIVE_SECONDS, "the first engine is idle")
        before = owner(runtime, MAIN)
        assert before.cached_bytes > HALF_BYTES
        asked = Burst(pool, other, burst)
        assert asked.sees(lambda: owner(runtime, OTHER).used_bytes > HALF_BYTES)
        after = owner(runtime, MAIN)
        assert after.ready_bytes < HALF_BYTES < before.ready_bytes
        assert after.evictions > before.evictions
        assert after.reclaims > before.reclaims
        assert not differences(asked.answers(), stock)
        again = client.answers(burst[:4])
        assert not differences(again, stock)
    record("requests.compared", len(burst) + len(again))


def test_a_cache_is_left_alone_while_there_is_room_for_others(
    client: Client, other: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    with watching(runtime):
        client.answers(extra_prompts["long"])
        until(lambda: not owner(runtime, MAIN).busy, GIVE_SECONDS, "the first engine is idle")
        before = owner(runtime, MAIN)
        assert before.cached_bytes > 10 * MIB
        answers = other.answers([*extra_prompts["long"], *extra_prompts["talkative"]])
        after = owner(runtime, MAIN)
    assert (after.evictions, after.reclaims) == (before.evictions, before.reclaims)
    assert after.cached_bytes == before.cached_bytes
    assert not differences(answers, stock)
    record("requests.compared", len(answers))


def test_kill_9_of_an_engine_in_the_peak_of_another_gives_that_one_the_memory(
    client: Client, other: Client, second: Server, runtime: Path, stock: Answers,
    extra_prompts: dict[str, list[Prompt]],
) -> None:  # fmt: skip
    burst = extra_prompts["burst"]
    # No request ends before its engine is killed, even on a slow machine.
    long = [prompt._replace(tokens=prompt.tokens[:900], max_tokens=1100) for prompt in burst]
    # No request ends before all have begun: a longer answer begins with the tokens of a shorter one.
    longer = {prompt: prompt._replace(max_tokens=192) for prompt in burst}
    with watching(runtime) as watch, ThreadPoolExecutor(2 * len(burst)) as pool:
        lost = [pool.submit(other.complete, prompt) for prompt in long]
        assert seen(lambda: owner(runtime, OTHER).used_bytes > HALF_BYTES // 2, lost)
        asked = Burst(pool, client, list(longer.values()))
        assert asked.sees(lambda: owner(runtime, MAIN).demand_bytes > 0)
        assert not any(future.done() for future in lost)
        assert owner(runtime, MAIN).used_bytes < GOT_BYTES
        kill_group(second.process.pid)
        until(lambda: not owners(runtime, OTHER), GIVE_SECONDS, "the dead engine's slot is nobody's")
        found = asked.answers()
        begun = {prompt: found[full][: prompt.max_tokens] for prompt, full in longer.items()}
        assert not differences(begun, stock)
        assert watch.peak_used_bytes[MAIN] > GOT_BYTES, "its memory is used"
        assert all(each.exception() is not None for each in lost)
    assert client.rpc("kvcached_check") == [None]
    record("engine.kills", 1)
    record("requests.compared", len(burst))
