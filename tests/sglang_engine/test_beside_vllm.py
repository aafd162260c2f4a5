"""A vLLM and an SGLang server with one budget of host memory, which goes to the server with requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import Answers, Client, Prompt, differences
from devkit.polling import until
from devkit.report import record
from devkit.servers import MODEL_NAME, QUICK_START, ROOT, Fleet, HttpServer, cores, free_port
from devkit.sglang_client import SglangClient
from devkit.watch import is_at_rest, owner, watching
from tests.engine.conftest import CAPACITY_BYTES, ELASTIC, HEADROOM_BYTES, MAIN, REST_SECONDS
from tests.sglang_engine.conftest import LENGTH, SETTINGS

pytestmark = pytest.mark.engine

OTHER = "vllm"
HALF_BYTES = (CAPACITY_BYTES - HEADROOM_BYTES) // 2
# `make setup` creates vLLM's own environment.
VLLM = Path(os.environ.get("TEST_VLLM_BIN") or ROOT / ".venv" / "bin") / "vllm"


class VllmServer(HttpServer):
    """`vllm serve` from vLLM's own environment."""

    def __init__(self, model: Path, runtime: Path, settings: dict[str, str]) -> None:
        port = free_port()
        flags = ["--served-model-name", MODEL_NAME, "--max-model-len", str(LENGTH), "--dtype", "float32"]
        where = ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
        packages = [QUICK_START, ROOT, ROOT / "cli", ROOT / "plugins" / "vllm_kvcached"]
        path = os.pathsep.join(map(str, packages))
        threads = {"VLLM_CPU_OMP_THREADS_BIND": cores(2).split("|")[1], "PYTHONPATH": path}
        command = [str(VLLM), "serve", str(model), *flags, *where, *ELASTIC]
        super().__init__("vllm-beside", runtime, port, command, settings | threads)


@pytest.fixture(scope="module")
def vllm(fleet: Fleet, model: Path, runtime: Path) -> Iterator[VllmServer]:
    """Return a vLLM server on the budget of the main SGLang server."""
    server = VllmServer(model, runtime, SETTINGS | {"KVCACHED_NAME": OTHER})
    with fleet.running(server):
        server.wait_ready()
        yield server


@pytest.fixture
def other(vllm: VllmServer, client: SglangClient, runtime: Path) -> Iterator[Client]:
    """Return a client of vLLM, both servers at rest."""
    with Client(vllm.url) as found:
        until(found.reset_prefix_cache, REST_SECONDS, "no request runs any more")
        until(lambda: is_at_rest(runtime, OTHER), REST_SECONDS, "a server that is left alone is at rest")
        yield found


def _at_once(
    pool: ThreadPoolExecutor, ids: Callable[[Prompt], tuple[int, ...]], prompts: list[Prompt]
) -> Answers:
    return dict(zip(prompts, pool.map(ids, prompts), strict=True))


def test_bursts_out_of_phase_take_turns_with_more_than_half_of_the_device(
    client: SglangClient, other: Client, runtime: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    burst = extra_prompts["burst"]
    with watching(runtime) as watch, ThreadPoolExecutor(2 * len(burst)) as pool:
        first = _at_once(pool, client.ids, burst)
        assert watch.peak_used_bytes[MAIN] > HALF_BYTES, "SGLang takes what it needs"
        assert owner(runtime, MAIN).cached_bytes > HALF_BYTES // 2
        theirs = _at_once(pool, other.ids, burst)
        assert watch.peak_used_bytes[OTHER] > HALF_BYTES, "vLLM takes what it needs from SGLang's cache"
        assert owner(runtime, MAIN).evictions > 0
        again = _at_once(pool, client.ids, burst)
        both = [pool.submit(one.ids, prompt) for prompt in burst[:8] for one in (client, other)]
        assert all(each.result() for each in both)
    assert not differences(first, stock)
    assert not differences(again, stock), "what SGLang gave up it computes again"
    assert all(len(theirs[prompt]) == prompt.max_tokens for prompt in burst)
    record("sglang.compared", len(first) + len(again))
    record("sglang.beside_vllm", len(first) + len(theirs) + len(again) + len(both))
