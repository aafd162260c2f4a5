"""Negative controls: the tests detect a page with wrong contents, and a page unmapped too early."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from devkit.client import Answers, Prompt, long_prompts
from devkit.polling import seen, until
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import SglangServer
from devkit.watch import owner, owners
from tests.engine.conftest import MAIN

pytestmark = pytest.mark.engine


def _sabotage(server: SglangServer, which: signal.Signals, sentence: str) -> None:
    """Make the rig damage the cache, and wait until it has done so."""
    before = server.text().count(sentence)
    (scheduler,) = server.schedulers()
    os.kill(scheduler, which)
    until(lambda: server.text().count(sentence) > before, 10, f"the rig says: {sentence}")


def test_i12_overwritten_granules_are_detected(
    elastic: SglangServer, client: SglangClient, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    for prompt in extra_prompts["cached"]:
        assert client.ids(prompt) == stock[prompt]
        assert client.ids(prompt) == stock[prompt], "a hit of the prefix cache changes nothing"
        _sabotage(elastic, signal.SIGUSR2, "granules overwritten")
        assert client.ids(prompt) != stock[prompt]
        assert client.reset_prefix_cache()
        assert client.ids(prompt) == stock[prompt]


def test_i5_a_page_unmapped_too_early_crashes_its_scheduler_and_leaves_a_clean_ledger(
    elastic: SglangServer, client: SglangClient, runtime: Path
) -> None:
    (endless,) = long_prompts(1, 250, 1700)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.ids, endless)
        seen(lambda: owner(runtime, MAIN).used_bytes > 2 * owner(runtime, MAIN).granule_bytes, [request])
        _sabotage(elastic, signal.SIGUSR1, "granules unmapped")
        # If the request ended just before, the prefix cache has its pages: the same request reads them.
        failure = request.exception(60) or pool.submit(client.ids, endless).exception(60)
        assert isinstance(failure, httpx.HTTPError)
    until(lambda: not owners(runtime), 1.0, "nobody holds a slot after the crash")
    elastic.wait(60)
    assert "Fatal Python error: Segmentation fault" in elastic.text()
