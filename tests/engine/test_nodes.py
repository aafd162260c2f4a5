"""Ranks on two nodes, each with its own ledger: one budget, outputs equal stock, a crash frees both nodes."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from devkit.client import Answers, Client, Prompt, differences
from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY
from devkit.report import record
from devkit.servers import Fleet
from devkit.watch import is_at_rest, owner, owners, watching
from kvcached_core.ledger import OwnerSnapshot, Runtime, check, snapshot
from tests.cli.process import kvctl
from tests.engine.conftest import ELASTIC, MIB, MODEL_FLAGS
from tests.engine.nodes import TwoNodes

pytestmark = pytest.mark.engine

NAME = "nodes"
SETTINGS = {"KVCACHED_NAME": NAME, "KVCACHED_HOST_CAPACITY": "200MiB", "KVCACHED_HEADROOM": "16MiB",
            "KVCACHED_SPARE": "4MiB", "KVCACHED_IDLE_SECONDS": "0.5"}  # fmt: skip
LIMIT = 8 * MIB
REST_SECONDS, OBEY_SECONDS, END_SECONDS = 6.0, 5.0, 20.0


@pytest.fixture(scope="module")
def engine(fleet: Fleet, model: Path) -> Iterator[TwoNodes]:
    """Return an engine with a rank on each node."""
    flags = [*MODEL_FLAGS, *ELASTIC, "--tensor-parallel-size", "2"]
    with (
        tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as place,
        fleet.running(TwoNodes(NAME, model, Path(place), flags, SETTINGS)) as both,
    ):
        both.wait_ready()
        yield both


def _ranks(engine: TwoNodes) -> list[OwnerSnapshot]:
    return [owner(runtime, NAME) for runtime in engine.runtimes]


class TestTwoNodes:
    """Tests in this order: load, take memory away, set a limit, kill."""

    def test_i12_outputs_equal_stock_and_memory_comes_and_goes_on_both_nodes(
        self, engine: TwoNodes, prompts: list[Prompt], extra_prompts: dict[str, list[Prompt]], stock: Answers
    ) -> None:
        near, far = engine.runtimes
        assert [each.rank for each in _ranks(engine)] == [0, 1]
        asked = [*prompts[:60], *extra_prompts["burst"][:8]]
        with Client(engine.url) as client:
            with watching(near) as at_home, watching(far) as far_away:
                answers = client.answers(asked)
            assert client.rpc("kvcached_check") == [None, None]
            assert not differences(answers, stock)
            record("requests.compared", len(answers))
            peaks = [watch.peak_ready_bytes[NAME] for watch in (at_home, far_away)]
            assert min(peaks) > 32 * MIB and max(peaks) - min(peaks) <= 32 * MIB, peaks
            assert [each.created_granules for each in _ranks(engine)] == [
                _ranks(engine)[0].created_granules
            ] * 2
            until(client.reset_prefix_cache, REST_SECONDS, "no request runs any more")
        until(lambda: all(is_at_rest(place, NAME) for place in (near, far)), REST_SECONDS, "both are at rest")

    def test_a_limit_on_the_followers_node_holds_on_both(
        self, engine: TwoNodes, prompts: list[Prompt], stock: Answers
    ) -> None:
        with Client(engine.url) as client:
            client.answers(prompts[:24])
            assert min(each.leased_bytes for each in _ranks(engine)) > LIMIT
            done = kvctl("limit", NAME, str(LIMIT), "--wait", "10", runtime=Runtime.open(engine.runtimes[1]))
            assert done.returncode == 0, done.stderr
            until(
                lambda: max(each.leased_bytes for each in _ranks(engine)) <= LIMIT, OBEY_SECONDS, "it holds"
            )
            with watching(engine.runtimes[0]) as at_home:
                answers = client.answers(prompts[24:48])
            assert not differences(answers, stock)
            assert at_home.peak_ready_bytes[NAME] <= LIMIT, "the budget is the least over ranks"
            record("requests.compared", len(answers))

    def test_i4_i11_a_follower_that_is_killed_ends_the_engine_and_frees_both_nodes(
        self, engine: TwoNodes, prompts: list[Prompt]
    ) -> None:
        os.kill(_ranks(engine)[1].worker_pid, signal.SIGKILL)
        record("engine.kills", 1)
        with Client(engine.url) as client, pytest.raises(httpx.HTTPError):
            client.ids(prompts[0])  # as in stock, the next step notices the death
        until(lambda: not any(map(owners, engine.runtimes)), END_SECONDS, "nobody holds anything")
        engine.wait(60)
        engine.follower.wait(60)
        for runtime in engine.runtimes:
            for device in snapshot(Runtime.open(runtime)):
                assert not check(device)
                assert sum(each.leased_bytes for each in device.owners if each.live) == 0
