"""Negative controls: the tests detect a page with wrong contents, and a page unmapped too early."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from devkit.client import Answers, Client, Prompt, long_prompts
from devkit.polling import seen, until
from devkit.servers import Server
from devkit.watch import owners

pytestmark = pytest.mark.engine


def test_i12_overwritten_granules_are_detected(
    client: Client, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    for prompt in extra_prompts["cached"]:
        assert client.ids(prompt) == stock[prompt]
        assert client.ids(prompt) == stock[prompt], "a hit of the prefix cache changes nothing"
        (granules,) = client.rpc("sabotage_overwrite")
        assert int(granules) > 0
        assert client.ids(prompt) != stock[prompt]
        assert client.reset_prefix_cache()
        assert client.ids(prompt) == stock[prompt]


def test_i5_a_page_unmapped_too_early_crashes_its_worker_and_leaves_a_clean_ledger(
    elastic: Server, client: Client, runtime: Path
) -> None:
    (endless,) = long_prompts(1, 250, 1700)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.ids, endless)
        seen(lambda: client.metric("vllm:num_requests_running") == 1, [request])
        (granules,) = client.rpc("sabotage_unmap")
        assert int(granules) > 0
        # If the request ended just before, the prefix cache has its pages: the same request reads them.
        failure = request.exception(60) or pool.submit(client.ids, endless).exception(60)
        assert isinstance(failure, httpx.HTTPError)
    until(lambda: not owners(runtime), 1.0, "nobody holds a slot after the crash")
    elastic.wait(60)
    assert "Fatal Python error: Segmentation fault" in elastic.text()
    assert "died unexpectedly" in elastic.text(), "its parent has seen it"
