"""Several ranks, one plan: outputs equal stock, and the death of one rank frees the memory of all ranks.

All engines in this file share a runtime directory: each starts where the engine before was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devkit.client import SEQUENTIAL, Answers, Client, Prompt, differences
from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY, table, title_of
from devkit.report import record
from devkit.servers import BIN, Child, Fleet, Server, cores, environment
from devkit.watch import owners, watching
from kvcached_core.ledger import Runtime, check, snapshot
from tests.engine.conftest import DEATH_SECONDS, ELASTIC, MODEL_FLAGS
from tests.engine.offline import ANSWER, PROMPTS_VARIABLE

pytestmark = pytest.mark.engine

_MEMORY = {"host_capacity": "200MiB", "headroom": "16MiB", "spare": "4MiB"}
NOTICE_SECONDS = (
    20.0  # vLLM notices the death and ends the other processes, on an idle machine in half a second
)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Return the runtime directory of this file's engines."""
    with tempfile.TemporaryDirectory(prefix="kvt-run-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


@contextmanager
def _engine(fleet: Fleet, name: str, model: Path, place: Path, flags: list[str], extra: dict[str, str],
            settings: dict[str, str]) -> Iterator[Server]:  # fmt: skip
    options = ["--additional-config", json.dumps({"kvcached": _MEMORY | settings | {"name": name}})]
    threads = {"VLLM_CPU_OMP_THREADS_BIND": cores(2)}
    with fleet.running(
        Server(name, model, place, [*MODEL_FLAGS, *flags, *options], threads | extra)
    ) as server:
        server.wait_ready()
        yield server


def _compare(server: Server, place: Path, prompts: list[Prompt], stock: Answers) -> None:
    with Client(server.url) as client, watching(place):
        answers = client.answers(prompts, SEQUENTIAL)
        assert client.rpc("kvcached_check") == [None, None]
    assert not differences(answers, stock)
    record("requests.compared", len(answers))


def _kill(server: Server, place: Path, choose: Callable[[int], int]) -> None:
    """Kill the process that `choose` finds from the last rank's worker; assert that all memory is freed."""
    workers = {owner.rank: owner.worker_pid for owner in owners(place)}
    assert workers.keys() == {0, 1}
    killed = choose(workers[1])
    os.kill(killed, signal.SIGKILL)
    record("engine.kills", 1)
    until(
        lambda: killed not in {owner.worker_pid for owner in owners(place)}, DEATH_SECONDS, "its slot is free"
    )
    seconds = until(lambda: not owners(place), NOTICE_SECONDS, "no process of the engine holds a slot")
    print(f"{server.name}: the last slot was free {seconds:.2f} s after the kill")
    for device in snapshot(Runtime.open(place)):
        assert not check(device)
    server.wait(60)


def _listed(place: Path, scratch: Path) -> list[str]:
    """Return the running engines that kvctl shows."""
    done = subprocess.run(
        [str(BIN / "kvctl"), "list", "--json"], env=environment(scratch, place, {}), capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    devices = json.loads(done.stdout)["devices"]
    return [engine["name"] for device in devices for engine in device["engines"] if engine["live"]]


@pytest.fixture(scope="module")
def tp2(fleet: Fleet, model: Path, place: Path) -> Iterator[Server]:
    """Return an engine of two ranks with small odd pages and chunked prefill."""
    # 32 tokens of 2 heads on each of 2 ranks make a block of 16 KiB in a layer. A page has room for 7.5 of
    # them: 7 are whole in each, and every second page boundary lies in a block that is never handed out.
    flags = [*ELASTIC, "--tensor-parallel-size", "2", "--block-size", "32", "--max-num-batched-tokens", "128"]
    with _engine(fleet, "tp2", model, place, flags, {}, {"page_size": "120KiB"}) as server:
        yield server


def test_i12_outputs_of_two_ranks_with_small_odd_pages_and_chunked_prefill_equal_stock(
    tp2: Server, place: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    assert all((each.blocks_per_granule, each.page_bytes) == (7, 120 << 10) for each in owners(place))
    _compare(tp2, place, prompts, stock)


def test_two_ranks_sleep_and_wake_together(
    tp2: Server, place: Path, stock: Answers, extra_prompts: dict[str, list[Prompt]]
) -> None:
    prompts = extra_prompts["cached"]
    with Client(tp2.url) as client, watching(place):
        assert not differences(client.answers(prompts), stock)
        for _ in range(2):
            client.sleep()
            ranks = owners(place)
            assert [rank.ready_bytes == rank.granule_bytes for rank in ranks] == [True, True]
            assert len({(rank.created_granules, rank.released_granules) for rank in ranks}) == 1
            assert client.wake_up("weights").is_success and client.is_sleeping()
            assert client.wake_up("kv_cache").is_success and not client.is_sleeping()
            assert not differences(client.answers(prompts), stock)
            assert client.rpc("kvcached_check") == [None, None]
    record("requests.compared", 3 * len(prompts))


def test_i4_a_killed_worker_frees_what_both_ranks_held(tp2: Server, place: Path, tmp_path: Path) -> None:
    _kill(tp2, place, lambda worker: worker)
    assert not _listed(place, tmp_path)


def test_i12_pp2_without_prefix_caching_by_the_variable_and_i4_a_killed_core_frees_all(
    fleet: Fleet, model: Path, place: Path, stock: Answers, prompts: list[Prompt]
) -> None:
    flags = ["--pipeline-parallel-size", "2", "--block-size", "32", "--no-enable-prefix-caching"]

    def core_of(worker: int) -> int:
        core = table()[worker].parent
        assert "EngineCore" in title_of(core), title_of(core)
        return core

    with _engine(fleet, "pp2", model, place, flags, {"ENABLE_KVCACHED": "true"}, {}) as server:
        assert all(each.blocks_per_granule >= 16 for each in owners(place))
        _compare(server, place, prompts, stock)
        assert all(each.cached_bytes == 0 for each in owners(place))
        _kill(server, place, core_of)


def test_an_engine_in_a_python_program_starts_where_others_were_killed_and_equals_stock(
    fleet: Fleet, model: Path, place: Path, stock: Answers, prompts: list[Prompt], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(prompts[:40]))
    command = [sys.executable, "-m", "tests.engine.offline", "elastic", str(model)]
    with fleet.running(Child("offline", place, command, {PROMPTS_VARIABLE: str(file)})) as child:
        assert child.wait(180) == 0
        text = child.text()
    (line,) = [line for line in text.splitlines() if line.startswith(ANSWER)]
    answers = dict(zip(prompts[:40], map(tuple, json.loads(line.removeprefix(ANSWER))), strict=True))
    assert not differences(answers, stock)
    assert "kvcached backend: driver host" in text
    assert not owners(place)
    record("requests.compared", len(answers))
