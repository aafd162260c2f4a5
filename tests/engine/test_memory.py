"""Memory follows the load, and an idle engine gives memory back."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devkit.client import Client, Prompt
from devkit.polling import until
from devkit.servers import BIN, Server, environment
from devkit.watch import is_at_rest, owner, watching
from tests.engine.conftest import CAPACITY_BYTES, MAIN, MIB, REST_SECONDS

pytestmark = pytest.mark.engine


def test_the_log_line_at_start_names_the_chosen_sizes(elastic: Server, runtime: Path) -> None:
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
    assert int(match[2]) == 128 * int(match[1]) == 128 * owner(runtime, MAIN).blocks_per_granule


def test_memory_grows_with_the_load_and_an_idle_engine_gives_it_back_by_itself(
    client: Client, runtime: Path, prompts: list[Prompt]
) -> None:
    assert is_at_rest(runtime, MAIN)
    usages: list[float] = []
    with watching(runtime) as watch, ThreadPoolExecutor(1) as pool:
        load = pool.submit(client.answers, prompts[:48])
        while not load.done():
            usages.append(client.metric("vllm:kv_cache_usage_perc"))
        load.result()
    assert watch.peak_ready_bytes[MAIN] > 20 * owner(runtime, MAIN).granule_bytes
    assert all(0.0 <= usage <= 1.0 for usage in usages)
    assert max(usages) > 0.0

    # Without any further request the spare granules are given back; cached blocks stay.
    def spare_is_gone() -> bool:
        now = owner(runtime, MAIN)
        return now.ready_bytes == now.mapped_bytes and now.spare_bytes < now.granule_bytes

    until(spare_is_gone, REST_SECONDS, "an idle engine lets its spare memory go")
    assert owner(runtime, MAIN).cached_bytes > 0
    assert client.metric("vllm:kv_cache_usage_perc") == 0.0

    assert client.reset_prefix_cache()
    until(lambda: is_at_rest(runtime, MAIN), REST_SECONDS, "a reset returns all but the null granule")
    assert client.rpc("kvcached_check") == [None]


def test_kvctl_limit_on_an_idle_engine_holds_and_evicts(
    elastic: Server, client: Client, runtime: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    client.answers(prompts[:24])
    before = owner(runtime, MAIN)
    assert before.cached_bytes > 6 * MIB
    command = [str(BIN / "kvctl"), "limit", MAIN, "6MiB"]
    done = subprocess.run(
        command, env=environment(tmp_path, runtime, {}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = owner(runtime, MAIN)
    assert after.limit_applied == 6 * MIB
    assert after.leased_bytes <= 6 * MIB
    assert after.cached_bytes < before.cached_bytes <= CAPACITY_BYTES
    # Evicted blocks are computed again, not read.
    assert client.answers(prompts[:4]).keys() == set(prompts[:4])
