"""Memory follows the load, a limit gives memory back, and SGLang reports the memory that is held."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import Prompt
from devkit.polling import until
from devkit.servers import BIN, environment
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import SglangServer
from devkit.watch import is_at_rest, owner, watching
from tests.engine.conftest import CAPACITY_BYTES, MAIN, MIB, REST_SECONDS
from tests.sglang_engine.conftest import PAGE

pytestmark = pytest.mark.engine


def _reported_bytes(client: SglangClient) -> float:
    """Return the size of the KV cache that SGLang reports, rounded to a thousandth of a GiB."""
    return float(client.state()["memory_usage"]["kvcache"]) * (1 << 30)


def test_the_log_lines_at_start_name_reserved_and_held_memory(elastic: SglangServer, runtime: Path) -> None:
    lines = [line for line in elastic.text().splitlines() if "kvcached backend:" in line]
    assert len(lines) == 1
    size = r"[\d.]+ [KMG]iB"
    expected = (
        rf"kvcached backend: driver host, page {size}, .*granule {size} = (\d+) blocks .*"
        rf"\((\d+) tokens\), virtual capacity {size}, floor {size}, limit {CAPACITY_BYTES // MIB} MiB, "
        rf"engine {MAIN} in ledger {re.escape(str(runtime))}/host/ledger"
    )
    match = re.search(expected, lines[0])
    assert match, lines[0]
    assert int(match[2]) == PAGE * int(match[1]) == PAGE * owner(runtime, MAIN).blocks_per_granule
    assert re.search(rf"KV Cache is reserved \(kvcached\): #tokens: \d+, {size} of addresses", elastic.text())


def test_memory_grows_with_the_load_and_an_idle_server_gives_it_back_by_itself(
    client: SglangClient, runtime: Path, prompts: list[Prompt]
) -> None:
    assert is_at_rest(runtime, MAIN)
    assert _reported_bytes(client) <= 2 * MIB
    with watching(runtime) as watch, ThreadPoolExecutor(1) as pool:
        pool.submit(client.answers, prompts[:48]).result()
    granule_bytes = owner(runtime, MAIN).granule_bytes
    assert watch.peak_ready_bytes[MAIN] > 20 * granule_bytes

    # Without any further request the spare granules are given back; cached pages stay.
    def spare_is_gone() -> bool:
        now = owner(runtime, MAIN)
        return now.ready_bytes == now.mapped_bytes and now.spare_bytes < granule_bytes

    until(spare_is_gone, REST_SECONDS, "an idle server lets its spare memory go")
    now = owner(runtime, MAIN)
    assert now.cached_bytes > 0
    assert _reported_bytes(client) == pytest.approx(now.ready_bytes, abs=1.1 * MIB)

    assert client.reset_prefix_cache()
    until(lambda: is_at_rest(runtime, MAIN), REST_SECONDS, "a flush returns all but the first granule")
    assert _reported_bytes(client) <= 2 * MIB


def test_kvctl_limit_on_an_idle_server_holds_and_evicts(
    client: SglangClient, runtime: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    first = client.answers(prompts[:24])
    before = owner(runtime, MAIN)
    assert before.cached_bytes > 12 * MIB
    command = [str(BIN / "kvctl"), "limit", MAIN, "12MiB"]
    done = subprocess.run(
        command, env=environment(tmp_path, runtime, {}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = owner(runtime, MAIN)
    assert after.limit_applied == 12 * MIB
    assert after.leased_bytes <= 12 * MIB
    assert after.cached_bytes < before.cached_bytes
    assert client.answers(prompts[:24]) == first, "what was evicted is computed again, not read"
