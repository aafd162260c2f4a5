"""Engines that tests share. Each starts when a test first needs it and ends with the session."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from devkit.client import SEQUENTIAL, Answers, Client, Prompt, long_prompts, many_prompts
from devkit.models import tiny_model
from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY
from devkit.servers import Fleet, HttpServer, Server
from devkit.watch import is_at_rest
from kvcached_core.ledger import Runtime, set_limit

MIB = 1 << 20
MAIN, CAPACITY_BYTES, HEADROOM_BYTES = "main", 112 * MIB, 16 * MIB
IDLE_SECONDS = 0.5
REST_SECONDS = IDLE_SECONDS + 5.0  # an idle machine needs milliseconds after IDLE_SECONDS
DEATH_SECONDS = 1.0  # the kernel frees the lock with the process
ATTEMPTS = 5  # for tests whose requests may end before the test observes them
SETTINGS = {
    "KVCACHED_HOST_CAPACITY": str(CAPACITY_BYTES),
    "KVCACHED_HEADROOM": str(HEADROOM_BYTES),
    "KVCACHED_SPARE": "4MiB",
    "KVCACHED_IDLE_SECONDS": str(IDLE_SECONDS),
}
MODEL_FLAGS = ["--max-model-len", "2048"]
ELASTIC = ["--kv-cache-backend", "kvcached"]

_FLEET = pytest.StashKey[Fleet]()
HttpServerT = TypeVar("HttpServerT", bound=HttpServer)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the list of child processes, whose logs a failing test's report shows."""
    config.stash[_FLEET] = Fleet()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forget log lines of earlier tests."""
    item.config.stash[_FLEET].forget_closed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the ends of the engines' logs to a failure's report."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {name}", text) for name, text in item.config.stash[_FLEET].tails()]
    return report


@pytest.fixture(scope="session")
def fleet(pytestconfig: pytest.Config) -> Iterator[Fleet]:
    """Yield the child processes of this session; end all of them afterwards."""
    yield pytestconfig.stash[_FLEET]
    pytestconfig.stash[_FLEET].close_all()


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Return the 200 requests that every configuration must answer like stock vLLM."""
    return many_prompts()


@pytest.fixture(scope="session")
def extra_prompts() -> dict[str, list[Prompt]]:
    """Return requests for single tests; stock vLLM answers them too."""
    return {
        "long": long_prompts(2, 1900, 8),  # 15 blocks of 128 tokens
        "talkative": long_prompts(8, 250, 400),  # grow from 2 to 6 blocks
        "cached": long_prompts(3, 700, 24),  # leave 5 blocks in the prefix cache
        "burst": long_prompts(12, 1800, 64),  # 15 blocks of 512 KiB: 90 MiB at the same time
    }


@pytest.fixture(scope="session")
def model() -> Path:
    """Return the folder of the tiny model."""
    return tiny_model()


@pytest.fixture(scope="session")
def runtime() -> Iterator[Path]:
    """Return the runtime directory that the main engine shares with other engines."""
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


class KeptAlive(Generic[HttpServerT]):
    """A server that starts when first needed, and again after a test has ended it."""

    def __init__(self, fleet: Fleet, start: Callable[[], HttpServerT]) -> None:
        self._fleet = fleet
        self._start = start
        self._server: HttpServerT | None = None

    def begin(self) -> HttpServerT:
        """Return the running server, which may not be ready yet."""
        if self._server is None or not self._server.alive:
            self.close()
            self._server = self._start()
            self._fleet.add(self._server)
        return self._server

    def ready(self) -> HttpServerT:
        """Return the running server once it serves."""
        server = self.begin()
        server.wait_ready()
        return server

    def close(self) -> None:
        """End the server, if there is one."""
        if self._server is not None:
            self._server.close()


def bring_to_rest(runtime: Path, client: Client) -> None:
    """Lift the main engine's limit and wait until the engine holds only the null granule."""
    set_limit(Runtime.open(runtime), MAIN, CAPACITY_BYTES)
    with client:
        until(client.reset_prefix_cache, REST_SECONDS, "no request runs any more")
    until(lambda: is_at_rest(runtime, MAIN), REST_SECONDS, "an engine that is left alone is at rest")


def answers_of(
    fleet: Fleet, server: HttpServer, client_type: Callable[[str], Client], prompts: list[Prompt],
    extra_prompts: dict[str, list[Prompt]],
) -> Answers:  # fmt: skip
    """Run a server until it has answered all of these prompts."""
    with fleet.running(server):
        server.wait_ready()
        with client_type(server.url) as client:
            answers = client.answers(prompts, SEQUENTIAL)
            for group in extra_prompts.values():
                answers |= client.answers(group)
    return answers


@pytest.fixture(scope="session")
def _main(fleet: Fleet, model: Path, runtime: Path) -> Iterator[KeptAlive[Server]]:
    """Return the holder of the main engine, which ends before its ledger."""
    settings = SETTINGS | {"KVCACHED_NAME": MAIN}
    extension = ["--worker-extension-cls", "tests.engine.saboteur.Saboteur"]

    flags = [*MODEL_FLAGS, *ELASTIC, *extension]
    with closing(KeptAlive(fleet, lambda: Server("main", model, runtime, flags, settings))) as kept:
        yield kept


@pytest.fixture(scope="session")
def stock(
    fleet: Fleet, model: Path, _main: KeptAlive[Server], prompts: list[Prompt],
    extra_prompts: dict[str, list[Prompt]],
) -> Answers:  # fmt: skip
    """Return the answers of stock vLLM without any plugin."""
    _main.begin()  # starts at the same time as stock: a start mostly uses one thread
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as runtime:
        server = Server("stock", model, Path(runtime), MODEL_FLAGS, {"VLLM_PLUGINS": ""})
        return answers_of(fleet, server, Client, prompts, extra_prompts)


@pytest.fixture
def elastic(_main: KeptAlive[Server], runtime: Path) -> Server:
    """Return the main engine at rest: no limit, an empty cache, and only the null granule held."""
    server = _main.ready()
    bring_to_rest(runtime, Client(server.url))
    return server


@pytest.fixture
def client(elastic: Server) -> Iterator[Client]:
    """Return a client of the main engine."""
    with Client(elastic.url) as client:
        yield client
