"""SGLang servers that tests share: started when first asked for, ended when the session ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engine.client import SEQUENTIAL, Answers, Prompt, long_prompts, many_prompts
from tests.engine.conftest import (  # their hooks and fixtures serve here as they do there
    CAPACITY_BYTES,
    ELASTIC,
    HEADROOM_BYTES,
    IDLE_SECONDS,
    MAIN,
    KeptAlive,
    bring_to_rest,
    fleet,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    runtime,
)
from tests.engine.server import SHARED_MEMORY, Fleet
from tests.models import tiny_model
from tests.sglang_engine.client import SglangClient
from tests.sglang_engine.server import STOCK, SglangServer

__all__ = ["fleet", "pytest_configure", "pytest_runtest_makereport", "pytest_runtest_setup", "runtime"]

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
]  # stock takes what is free: as much as the others
SETTINGS = {
    "KVCACHED_HOST_CAPACITY": str(CAPACITY_BYTES),
    "KVCACHED_HEADROOM": str(HEADROOM_BYTES),
    "KVCACHED_SPARE": "4MiB",
    "KVCACHED_IDLE_SECONDS": str(IDLE_SECONDS),
}


@pytest.fixture(scope="session")
def model() -> Path:
    """Return the folder of the tiny model."""
    return tiny_model()


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Return the 200 requests that every configuration has to answer as stock does."""
    return many_prompts()


@pytest.fixture(scope="session")
def extra_prompts() -> dict[str, list[Prompt]]:
    """Return requests for special occasions, which stock answers too."""
    return {
        "long": long_prompts(2, 1900, 8),
        "talkative": long_prompts(8, 250, 400),
        "cached": long_prompts(3, 700, 24),
        "burst": long_prompts(24, 1800, 64),
    }


@pytest.fixture(scope="session")
def _main(fleet: Fleet, model: Path, runtime: Path) -> Iterator[KeptAlive[SglangServer]]:
    """Return what gives the main server; it ends before its ledger."""
    settings = SETTINGS | {"KVCACHED_NAME": MAIN, "SGLANG_RIG": "saboteur"}
    # asleep when idle: another server in these tests has the core to itself
    flags = [*MODEL_FLAGS, *PAGED, *ELASTIC, "--sleep-on-idle"]
    start = partial(SglangServer, "sglang-main", model, runtime, flags, settings)
    with closing(KeptAlive(fleet, start)) as kept:
        yield kept


@pytest.fixture(scope="session")
def stock(
    fleet: Fleet, model: Path, _main: KeptAlive[SglangServer], prompts: list[Prompt],
    extra_prompts: dict[str, list[Prompt]],
) -> Answers:  # fmt: skip
    """Return what stock SGLang, without any plugin, answers."""
    _main.begin()  # beside stock: most of a start is one thread's work
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        server = SglangServer("sglang-stock", model, Path(folder), [*MODEL_FLAGS, *PAGED, *TOKENS], STOCK)
        with fleet.running(server):
            server.wait_ready()
            with SglangClient(server.url) as client:
                answers = client.answers(prompts, SEQUENTIAL)
                for group in extra_prompts.values():
                    answers |= client.answers(group)
    return answers


@pytest.fixture
def elastic(_main: KeptAlive[SglangServer], runtime: Path) -> SglangServer:
    """Return the main server, with its limit lifted, nothing cached and no memory but the first granule."""
    server = _main.ready()
    bring_to_rest(runtime, SglangClient(server.url))
    return server


@pytest.fixture
def client(elastic: SglangServer) -> Iterator[SglangClient]:
    """Return a client of the main server."""
    with SglangClient(elastic.url) as client:
        yield client
