"""A model with sliding windows: both of its pools are elastic, and it answers as stock does.

SGLang's attention on the CPU reads a window's pool at slot numbers of the other pool. So stock and elastic
servers both use the test rig's attention here; everything else is SGLang's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from devkit.client import SEQUENTIAL, Answers, Prompt, differences, long_prompts
from devkit.models import WINDOW, windowed_model
from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY
from devkit.report import record
from devkit.servers import Fleet
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import SglangServer
from devkit.watch import owner, watching
from kvcached_core.ledger import OwnerSnapshot
from tests.engine.conftest import CAPACITY_BYTES, ELASTIC, MIB, REST_SECONDS
from tests.sglang_engine.conftest import MODEL_FLAGS, PAGED, SETTINGS, TOKENS
from tests.sglang_engine.limits import moving_limit

pytestmark = pytest.mark.engine

NAME, AT_ONCE = "windows", 32
LIMITS_BYTES = (14 * MIB, 80 * MIB, 18 * MIB)  # the least is above one request of the maximum length
FLAGS = [*MODEL_FLAGS, *PAGED, "--attention-backend", "windows"]
RIG = {"SGLANG_RIG": "windows"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return the runtime directory of this file's servers."""
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def longer(prompts: list[Prompt]) -> list[Prompt]:
    """Return requests below, over and far over the window's length; some share a prefix."""
    return [*prompts[:40], *long_prompts(8, 5 * WINDOW, 48), *long_prompts(4, 12 * WINDOW, 24)]


@pytest.fixture(scope="module")
def stock_windows(fleet: Fleet, place: Path, longer: list[Prompt]) -> Answers:
    """Return stock SGLang's answers with the rig's attention."""
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
    """Return the server's slot in the ledger if all its memory is mapped, else None."""
    now = owner(place, NAME)
    return now if now.ready_bytes == now.mapped_bytes == now.leased_bytes else None


def test_i12_windows_outputs_equal_stock_while_a_limit_moves_and_both_pools_give_back(
    windows: SglangServer, place: Path, longer: list[Prompt], stock_windows: Answers
) -> None:
    assert windows.text().count("KV Cache is reserved (kvcached)") == 2
    with SglangClient(windows.url) as client:
        assert client.reset_prefix_cache()
        until(lambda: _resting(place) is not None, REST_SECONDS, "a server that is left alone is at rest")
        idle_bytes = owner(place, NAME).ready_bytes
        answers: list[Answers] = []
        with watching(place) as watch, moving_limit(place, NAME, LIMITS_BYTES, CAPACITY_BYTES) as limit:
            while limit.made < len(LIMITS_BYTES):  # one pass on a slow machine
                answers.append(client.all_at_once(longer, AT_ONCE))
        assert not [wrong for each in answers for wrong in differences(each, stock_windows)]
        assert watch.peak_used_bytes[NAME] > 8 * MIB
        until(client.reset_prefix_cache, REST_SECONDS, "no request runs any more")

        def is_as_before() -> bool:
            now = _resting(place)
            return now is not None and now.ready_bytes == idle_bytes

        until(is_as_before, REST_SECONDS, "what both pools took is given back")
    assert windows.alive, "SGLang's own checks, strict in these tests, end a server that leaks"
    record("sglang.compared", sum(map(len, answers)))
