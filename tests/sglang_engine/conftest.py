"""SGLang servers that tests share. Each starts when a test first needs it and ends with the session."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from devkit.client import Answers, Prompt
from devkit.process_groups import SHARED_MEMORY
from devkit.servers import Fleet
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import STOCK, SglangServer
from tests.engine.conftest import (  # hooks and fixtures that both engines' tests use
    CAPACITY_BYTES,
    ELASTIC,
    MAIN,
    SETTINGS,
    KeptAlive,
    answers_of,
    bring_to_rest,
    extra_prompts,
    fleet,
    model,
    prompts,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    runtime,
)

__all__ = [
    "SETTINGS",
    "extra_prompts",
    "fleet",
    "model",
    "prompts",
    "pytest_configure",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
    "runtime",
]

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]

LENGTH, PAGE = 2048, 16
MODEL_FLAGS = [
    "--context-length",
    str(LENGTH),
    "--max-running-requests",
    "16",
    "--chunked-prefill-size",
    "512",
]
PAGED = ["--page-size", str(PAGE)]
TOKENS = [
    "--max-total-tokens",
    str(CAPACITY_BYTES // 4096),
]  # stock would take all free memory: give it as much as the others


@pytest.fixture(scope="session")
def _main(fleet: Fleet, model: Path, runtime: Path) -> Iterator[KeptAlive[SglangServer]]:
    """Return the holder of the main server, which ends before its ledger."""
    settings = SETTINGS | {"KVCACHED_NAME": MAIN, "SGLANG_RIG": "saboteur"}
    # sleep when idle, so that another server in these tests has the CPU core to itself
    flags = [*MODEL_FLAGS, *PAGED, *ELASTIC, "--sleep-on-idle"]
    start = partial(SglangServer, "sglang-main", model, runtime, flags, settings)
    with closing(KeptAlive(fleet, start)) as kept:
        yield kept


@pytest.fixture(scope="session")
def stock(
    fleet: Fleet, model: Path, _main: KeptAlive[SglangServer], prompts: list[Prompt],
    extra_prompts: dict[str, list[Prompt]],
) -> Answers:  # fmt: skip
    """Return the answers of stock SGLang without any plugin."""
    _main.begin()  # starts at the same time as stock: a start mostly uses one thread
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        server = SglangServer("sglang-stock", model, Path(folder), [*MODEL_FLAGS, *PAGED, *TOKENS], STOCK)
        return answers_of(fleet, server, SglangClient, prompts, extra_prompts)


@pytest.fixture
def elastic(_main: KeptAlive[SglangServer], runtime: Path) -> SglangServer:
    """Return the main server at rest: no limit, an empty cache, and only the first granule held."""
    server = _main.ready()
    bring_to_rest(runtime, SglangClient(server.url))
    return server


@pytest.fixture
def client(elastic: SglangServer) -> Iterator[SglangClient]:
    """Return a client of the main server."""
    with SglangClient(elastic.url) as client:
        yield client
