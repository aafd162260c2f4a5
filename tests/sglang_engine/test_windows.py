"""A model with sliding windows: both of its pools are elastic, and it answers as stock does.

SGLang's attention on the CPU reads a window's pool by the numbers of the other one, so stock and elastic both
have the test rig's attention here; all else is SGLang's.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcached_core.ledger import OwnerSnapshot, Runtime, set_limit
from tests.engine.client import SEQUENTIAL, Answers, Prompt, differences, long_prompts
from tests.engine.conftest import CAPACITY_BYTES, ELASTIC, MIB, REST_SECONDS
from tests.engine.server import SHARED_MEMORY, Fleet, until
from tests.engine.watch import owner, watching
from tests.models import WINDOW, windowed_model
from tests.report import record
from tests.sglang_engine.client import SglangClient
from tests.sglang_engine.conftest import MODEL_FLAGS, PAGED, SETTINGS, TOKENS
from tests.sglang_engine.server import SglangServer

pytestmark = pytest.mark.engine

NAME, AT_ONCE, LIMIT_SECONDS = "windows", 32, 1.0
LIMITS_BYTES = (14 * MIB, 100 * MIB, 18 * MIB)  # the least is above one request of the maximum length
FLAGS = [*MODEL_FLAGS, *PAGED, "--attention-backend", "windows"]
RIG = {"SGLANG_RIG": "windows"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return the runtime directory of this file's servers."""
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def longer(prompts: list[Prompt]) -> list[Prompt]:
    """Return requests below, over and far over the window's length; some begin alike."""
    return [*prompts[:40], *long_prompts(8, 5 * WINDOW, 48), *long_prompts(4, 12 * WINDOW, 24)]


@pytest.fixture(scope="module")
def stock_windows(fleet: Fleet, place: Path, longer: list[Prompt]) -> Answers:
    """Return what stock SGLang answers with the rig's attention."""
    settings = RIG | {"SGLANG_PLUGINS": "rig"}
    server = SglangServer("sglang-stock-windows", windowed_model(), place, [*FLAGS, *TOKENS], settings)
    with fleet.running(server):
        server.wait_ready()
        with SglangClient(server.url) as client:
            return client.answers(longer, SEQUENTIAL)


@pytest.fixture(scope="module")
def windows(fleet: Fleet, place: Path, stock_windows: Answers) -> Iterator[SglangServer]:
    """Return an elastic server of the same model."""
    settings = SETTINGS | RIG | {"KVCACHED_NAME": NAME}
    server = SglangServer("sglang-windows", windowed_model(), place, [*FLAGS, *ELASTIC], settings)
    with fleet.running(server):
        server.wait_ready()
        yield server


def _resting(place: Path) -> OwnerSnapshot | None:
    """Return what the ledger shows if all memory that exists is mapped, else None."""
    now = owner(place, NAME)
    return now if now.ready_bytes == now.mapped_bytes == now.leased_bytes else None


def _move_limit(place: Path, stop: threading.Event) -> int:
    """Move the limit every second, and return how often."""
    opened = Runtime.open(place)
    for moves, limit_bytes in enumerate(itertools.cycle(LIMITS_BYTES)):
        if stop.wait(LIMIT_SECONDS):
            set_limit(opened, NAME, CAPACITY_BYTES)
            return moves
        set_limit(opened, NAME, limit_bytes)
    raise AssertionError("a cycle has no end")


def test_i12_windows_outputs_equal_stock_while_a_limit_moves_and_both_pools_give_back(
    windows: SglangServer, place: Path, longer: list[Prompt], stock_windows: Answers
) -> None:
    assert windows.text().count("KV Cache is reserved (kvcached)") == 2
    stop = threading.Event()
    with SglangClient(windows.url) as client:
        assert client.reset_prefix_cache()
        until(lambda: _resting(place) is not None, REST_SECONDS, "a server that is left alone is at rest")
        idle_bytes = owner(place, NAME).ready_bytes
        with watching(place) as watch, ThreadPoolExecutor(1) as pool:
            moves = pool.submit(_move_limit, place, stop)
            try:
                answers = client.all_at_once(longer, AT_ONCE)
            finally:
                stop.set()
        assert not differences(answers, stock_windows)
        assert moves.result() >= 3
        assert watch.peak_used_bytes[NAME] > 8 * MIB
        until(client.reset_prefix_cache, REST_SECONDS, "no request runs any more")

        def is_as_before() -> bool:
            now = _resting(place)
            return now is not None and now.ready_bytes == idle_bytes

        until(is_as_before, REST_SECONDS, "what both pools took is given back")
    assert windows.alive, "SGLang's own checks, strict in these tests, end a server that leaks"
    record("sglang.compared", len(answers))
