"""Two ranks that sleep and wake: each holds its null granule alone, both count alike, answers stay."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.engine.client import Client, Prompt
from tests.engine.conftest import ELASTIC, MODEL_FLAGS
from tests.engine.server import SHARED_MEMORY, Fleet, Server, cores
from tests.engine.watch import owners, watching

pytestmark = pytest.mark.engine


def test_two_ranks_sleep_and_wake_together(
    fleet: Fleet, model: Path, extra_prompts: dict[str, list[Prompt]]
) -> None:
    prompts = extra_prompts["cached"]
    settings = {"host_capacity": "200MiB", "headroom": "16MiB", "spare": "4MiB", "name": "tp2-sleep"}
    flags = [*MODEL_FLAGS, *ELASTIC, "--tensor-parallel-size", "2",
             "--additional-config", json.dumps({"kvcached": settings})]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        place = Path(folder)
        server = Server("tp2-sleep", model, place, flags, {"VLLM_CPU_OMP_THREADS_BIND": cores(2)})
        with fleet.running(server):
            server.wait_ready()
            with Client(server.url) as client, watching(place):
                before = client.answers(prompts)
                for _ in range(2):
                    client.sleep()
                    ranks = owners(place)
                    assert [rank.ready_bytes == rank.granule_bytes for rank in ranks] == [True, True]
                    assert len({(rank.created_granules, rank.released_granules) for rank in ranks}) == 1
                    assert client.wake_up("weights").is_success and client.is_sleeping()
                    assert client.wake_up("kv_cache").is_success and not client.is_sleeping()
                    assert client.answers(prompts) == before
                    assert client.rpc("kvcached_check") == [None, None]
