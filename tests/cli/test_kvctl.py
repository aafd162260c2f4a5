"""kvctl through its main() and as a process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import Account, Desk, Runtime
from kvctl import doctor
from tests.cli.conftest import Run
from tests.ledger.helpers import CAPACITY, GRANULE, Usage, attach, hold

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def worker(account: Account) -> Iterator[None]:
    """Do what a worker's thread does: acknowledge when the bell rings."""
    end, stop = os.pipe()

    def work() -> None:
        while end not in (ready := select.select([account.fileno(), end], [], [])[0]):
            assert ready
            account.drain()
            account.acknowledge()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        os.close(stop)
        thread.join()
        os.close(end)


def test_list_of_nothing_is_empty_and_makes_nothing(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "none"
    code, out, err = run("list", "--runtime-dir", str(folder))
    assert (code, out) == (0, "") and "no engine is running" in err
    assert run("list", "--json", "--runtime-dir", str(folder))[:2] == (
        0,
        '{\n  "version": 1,\n  "devices": []\n}\n',
    )
    assert not folder.exists()


def test_list_shows_what_each_engine_holds(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a", name="llama", limit_bytes=32 * GRANULE, floor_bytes=2 * GRANULE)
    attach(runtime, "b", name="qwen", device=DeviceIdentity("GPU-1234", "gpu"))
    hold(account, 20)
    desk = Desk.find(runtime, "a", 1)
    desk.publish(Usage(used_blocks=12, cached_blocks=8, stranded_blocks=4))
    desk.close()
    code, out, err = run("list")
    assert (code, err) == (0, "")
    header, *lines = (" ".join(line.split()) for line in out.splitlines())
    assert header == "NAME RANK DEVICE ENGINE MODEL USED CACHED SPARE HELD LIMIT FLOOR STATE"
    sizes = {line.split()[0]: line for line in lines}
    assert sizes["llama"] == "llama 0 host test 1 tiny 3 MiB 2 MiB 14 MiB 20 MiB 32 MiB 2 MiB running"
    assert "GPU-1234" in sizes["qwen"] and "device" in sizes["qwen"]
    assert [line.split()[0] for line in run("list", "qwen")[1].splitlines()[1:]] == ["qwen"]
    for device in ("GPU", "0", "GPU-1234"):
        assert [line.split()[0] for line in run("list", "--device", device)[1].splitlines()[1:]] == ["qwen"]


def test_list_json_has_plain_bytes(runtime: Runtime, run: Run) -> None:
    hold(attach(runtime, "a", name="llama", limit_bytes=32 * GRANULE), 20)
    code, out, _ = run("list", "--json")
    data = json.loads(out)
    assert code == 0 and data["version"] == 1
    (device,) = data["devices"]
    (engine,) = device["engines"]
    assert (device["uuid"], device["capacity_bytes"], device["leased_bytes"]) == (
        "host",
        CAPACITY,
        20 * GRANULE,
    )
    expected: dict[str, Any] = {
        "name": "llama", "rank": 0, "instance": "a", "live": True, "state": "running",
        "ready_bytes": 20 * GRANULE, "spare_bytes": 20 * GRANULE,
        "limit_bytes": 32 * GRANULE,
        "floor_bytes": 0, "created_granules": 20,
    }  # fmt: skip
    assert {key: engine[key] for key in expected} == expected


@pytest.mark.parametrize(
    "command", [("list", "lama"), ("limit", "lama", "1GiB"), ("limit-percent", "lama", "5")]
)
def test_a_wrong_name_is_3_and_the_nearest_is_named(
    runtime: Runtime, run: Run, command: tuple[str, ...]
) -> None:
    code, out, err = run(*command)
    assert (code, out) == (3, "") and "none is running" in err
    attach(runtime, "a", name="llama")
    code, out, err = run(*command)
    assert (code, out) == (3, "") and "did you mean 'llama'?" in err


@pytest.mark.parametrize(
    "command",
    [
        ("limit", "m", "3 MB of"), ("limit", "m", "-1"), ("limit", "m", "101%"),
        ("limit-percent", "m", "101"), ("limit-percent", "m", "x"), ("limit", "m"),
        ("limit", "m", "1", "--wait", "-1"), ("nothing",), (),
        ("list", "--device", "7"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2_and_changes_nothing(runtime: Runtime, run: Run, command: tuple[str, ...]) -> None:
    account = attach(runtime, "a")
    code, out, err = run(*command)
    assert (code, out) == (2, "") and err
    account.acknowledge()
    assert account.limit_bytes == CAPACITY


def test_a_limit_waits_until_it_holds(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    hold(account, 3)
    with worker(account):
        code, out, err = run("limit", "m", "8MiB", "--wait", "60")
        assert (code, err) == (0, "") and "8 MiB  3 MiB  holds" in out
        code, out, _ = run("limit-percent", "m", "50", "--json", "--wait", "60")
    data = json.loads(out)
    assert code == 0 and data["version"] == 1 and data["holds"] is True
    (rank,) = data["ranks"]
    assert (rank["limit_bytes"], rank["leased_bytes"], rank["acknowledged"]) == (
        CAPACITY // 2,
        3 * GRANULE,
        True,
    )
    assert account.limit_bytes == CAPACITY // 2


def test_a_limit_that_does_not_hold_in_time_is_4_and_says_why(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    code, out, err = run("limit", "m", "8MiB", "--wait", "0.05")
    assert code == 4 and "not acknowledged" in out and "1 of 1 ranks have not acknowledged it" in err
    with worker(account):
        code, out, err = run("limit", "m", "9MiB", "--wait", "0.05", "--json")
    assert code == 4 and json.loads(out)["holds"] is False
    assert "does not hold after 0.05 s" in err and "kvctl list m" in err
    account.give_back(granules_released=12)
    assert run("limit", "m", "8MiB", "--no-wait")[0] == 0


def test_a_limit_below_the_floor_is_set_and_said(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a", floor_bytes=10 * GRANULE)
    with worker(account):
        code, _, err = run("limit", "m", "4MiB", "--wait", "60")
    assert code == 0 and "below its floor of 10 MiB" in err and "its floor is the limit, 4 MiB" in err


def test_a_limit_for_one_device_leaves_the_others(runtime: Runtime, run: Run) -> None:
    accounts = [attach(runtime, "a", 0), attach(runtime, "a", 1, device=DeviceIdentity("GPU-9", "gpu"))]
    assert run("limit", "m", "4MiB", "--device", "GPU-9", "--no-wait")[0] == 0
    for account in accounts:
        account.acknowledge()
    assert [account.limit_bytes for account in accounts] == [CAPACITY, 4 * GRANULE]


def test_a_damaged_ledger_is_5(runtime: Runtime, run: Run) -> None:
    attach(runtime, "a")
    runtime.device("host").ledger.write_bytes(b"x" * 70_000)
    code, _, err = run("list")
    assert code == 5 and "damaged" in err
    assert run("doctor")[0] == 5


def test_an_unsafe_runtime_directory_is_1_and_says_what_to_do(tmp_path: Path, run: Run) -> None:
    tmp_path.chmod(0o777)
    code, _, err = run("list", "--runtime-dir", str(tmp_path))
    assert code == 1 and "chmod 700" in err
    code, out, _ = run("doctor", "--runtime-dir", str(tmp_path))
    assert code == 1 and "chmod 700" in out


def kvctl(*arguments: str, runtime: Runtime) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "KVCACHED_RUNTIME_DIR": str(runtime.path)}
    command = [sys.executable, "-m", "kvctl", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_kvctl_as_a_process(runtime: Runtime) -> None:
    account = attach(runtime, "a", name="llama")
    assert "llama" in kvctl("list", runtime=runtime).stdout
    assert kvctl("list", "nobody", runtime=runtime).returncode == 3
    with worker(account):
        done = kvctl("limit", "llama", "8MiB", "--wait", "30", runtime=runtime)
    assert (done.returncode, done.stderr) == (0, "") and "holds" in done.stdout
    assert account.limit_bytes == 8 * GRANULE
    assert "exit codes" in kvctl("--help", runtime=runtime).stdout
    assert kvctl("--version", runtime=runtime).stdout.startswith("kvctl 0.")
    assert "\x1b" not in kvctl("list", runtime=runtime).stdout


def test_kvctl_imports_nothing_heavy() -> None:
    code = (
        "import sys, kvctl.main, kvctl.listing, kvctl.limit, kvctl.doctor\n"
        "heavy = {'torch', 'vllm', 'sglang', 'cupy', 'cuda', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
    assert doctor.run_doctor.__module__ == "kvctl.doctor"
