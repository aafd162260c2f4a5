"""kvctl and the start scripts with a real server: their numbers equal the kernel's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from devkit.polling import until
from devkit.servers import BIN, ROOT, Fleet, HttpServer, free_port
from kvcached_core.ledger import Runtime
from tests.cli.process import environment, kvctl
from tests.engine.conftest import CAPACITY_BYTES, HEADROOM_BYTES, MIB

pytestmark = pytest.mark.engine

NAME, PROMPTS, OUTPUT = "demo", 8, 8
INPUT = {
    "vllm": 600,
    "sglang": 300,
}  # words; the tiny tokenizer makes six times as many tokens of SGLang's text
_SOURCES = os.pathsep.join(
    str(ROOT / part) for part in ("", "cli", "plugins/vllm_kvcached", "plugins/sglang_kvcached")
)
_PATH = os.pathsep.join((str(BIN), os.environ["PATH"]))  # the scripts find the engine in it


def rank_of(data: Any) -> dict[str, Any]:
    """Return the only rank of the only device."""
    (device,) = data["devices"]
    (rank,) = device["engines"]
    found: dict[str, Any] = rank
    return found


def listed(runtime: Runtime) -> dict[str, Any]:
    """Return the rank as `kvctl list --json` shows it."""
    done = kvctl("list", NAME, "--json", runtime=runtime)
    assert done.returncode == 0, done.stderr
    return rank_of(json.loads(done.stdout))


def kernel_bytes(pid: int) -> int:
    """Return the bytes that the kernel counts for a worker's pages."""
    found = [fd.stat() for fd in Path(f"/proc/{pid}/fd").iterdir() if "memfd:kvcached" in os.readlink(fd)]
    assert len(found) == 1
    return found[0].st_blocks * 512


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@contextlib.contextmanager
def script(engine: str, fleet: Fleet, folder: Path, port: int, flags: Sequence[str],
           **settings: str) -> Iterator[Runtime]:  # fmt: skip
    """Run start_server.sh during the block; yield the runtime directory once the server is ready."""
    folder.mkdir(mode=0o700)
    settings |= {"KVCACHED_HOST_CAPACITY": str(CAPACITY_BYTES), "KVCACHED_HEADROOM": str(HEADROOM_BYTES),
                 "KVCACHED_SPARE": "4MiB", "PYTHONPATH": _SOURCES, "PATH": _PATH}  # fmt: skip
    command = [str(ROOT / "benchmarks/serve/start_server.sh"), engine, "--port", str(port), "--name", NAME]
    command += ["--device", "cpu", "--", *flags]
    with fleet.running(HttpServer(f"start-{engine}", folder, port, command, settings)) as server:
        server.wait_ready()
        yield Runtime.open(folder)


@pytest.fixture(scope="module")
def engine() -> str:
    """Return the name of the engine that the scripts start."""
    return "vllm"


@pytest.fixture(scope="module")
def served(
    engine: str, fleet: Fleet, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    """Run start_server.sh; yield the runtime directory."""
    folder = tmp_path_factory.mktemp("start") / "run"
    with script(engine, fleet, folder, port, ["--dtype", "float32"]) as runtime:
        yield runtime


class Scripts:
    """Tests in this order: load the engine, read its numbers, take memory away."""

    def test_the_client_script_runs_the_engines_own_benchmark_and_leaves_a_cache(
        self, served: Runtime, port: int, engine: str
    ) -> None:
        options = f"{engine} --port {port} --name {NAME} --prompts {PROMPTS} --rate inf"
        sizes = ["--input", str(INPUT[engine]), "--output", str(OUTPUT)]
        done = subprocess.run(
            [ROOT / "benchmarks/serve/start_client.sh", *options.split(), *sizes],
            capture_output=True, text=True,
            env=environment(served, HF_HUB_OFFLINE="1", PATH=_PATH), timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(rf"Successful requests: +{PROMPTS}\b", done.stdout)
        assert re.search(rf"Total generated tokens: +{PROMPTS * OUTPUT}\b", done.stdout), done.stdout
        until(lambda: listed(served)["cached_bytes"] > 0, 10, "the requests have left a cache")

    def test_list_watch_and_kvtop_show_the_kernels_numbers(self, served: Runtime) -> None:
        until(lambda: listed(served)["spare_bytes"] == 0, 30, "spare memory is given back")
        rank = listed(served)
        page, pid = rank["page_bytes"], rank["worker_pid"]
        assert abs(rank["ready_bytes"] - kernel_bytes(pid)) <= page and rank["ready_bytes"] > 4 * MIB
        (line,) = kvctl("watch", "--count", "1", "--json", runtime=served).stdout.splitlines()
        assert abs(rank_of(json.loads(line))["ready_bytes"] - kernel_bytes(pid)) <= page
        shown = kvctl("kvtop", "--once", runtime=served).stdout
        of = f"{CAPACITY_BYTES // MIB}.0 MiB"
        used = re.search(rf"Prealloc: ([\d.]+) MiB \| Used: ([\d.]+) MiB / {of}", shown)
        assert used, shown
        assert abs((float(used[1]) + float(used[2])) * MIB - kernel_bytes(pid)) <= page + 0.1 * MIB
        assert kvctl("check", runtime=served).returncode == 0

    def test_limit_and_trim_are_obeyed_by_an_idle_server(self, served: Runtime) -> None:
        pid, before = listed(served)["worker_pid"], listed(served)["ready_bytes"]
        half = before // 2
        done = kvctl("limit", NAME, str(half), "--wait", "30", "--json", runtime=served)
        assert done.returncode == 0, done.stderr
        until(lambda: kernel_bytes(pid) <= half, 10, "the pages are the kernel's again")
        assert listed(served)["cached_bytes"] > 0
        assert kvctl("limit", NAME, "100%", runtime=served).returncode == 0
        done = kvctl("trim", NAME, "--wait", "30", "--json", runtime=served)
        assert done.returncode == 0, done.stderr
        rank = listed(served)
        # Only the null block's granule is left, which is never given back.
        assert rank["ready_bytes"] == rank["granule_bytes"] > rank["cached_bytes"]
        until(
            lambda: kernel_bytes(pid) == rank["granule_bytes"], 10, "all but the null granule is given back"
        )


class TestVllm(Scripts):
    """With vLLM."""
