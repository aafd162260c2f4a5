"""kvctl through main() and as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcached_core.ledger import Runtime
from kvctl.commands import doctor
from tests.cli.conftest import Run, worker
from tests.ledger.helpers import CAPACITY, GRANULE, attach, picture

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ("list", "lama"), ("limit", "lama", "1GiB"), ("limit-percent", "lama", "5"),
        ("floor", "lama", "1GiB"), ("weight", "lama", "5"),
    ],
)  # fmt: skip
def test_a_wrong_name_exits_with_3_and_suggests_the_most_similar(
    runtime: Runtime, run: Run, command: tuple[str, ...]
) -> None:
    code, out, err = run(*command)
    assert (code, out) == (3, "") and "no engine is running" in err
    attach(runtime, "a", name="llama")
    code, out, err = run(*command)
    assert (code, out) == (3, "") and "did you mean 'llama'?" in err


@pytest.mark.parametrize(
    "command",
    [
        ("limit", "m", "3 MB of"), ("limit", "m", "-1"), ("limit", "m", "101%"),
        ("limit-percent", "m", "101"), ("limit-percent", "m", "x"), ("limit", "m"),
        ("limit", "m", "1", "--wait", "-1"), ("nothing",), ("list", "--wde"),
        ("list", "--device", "7"), ("history", "-n", "0"), ("history", "-n", "x"),
        ("floor", "m", "x"), ("floor", "m", "101%"), ("weight", "m", "0"), ("weight", "m", "1.5"),
        ("weight", "m", "1000001"), ("weight", "m", "50%"), ("weight", "m", "1", "--wait", "x"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2_without_effect(
    runtime: Runtime, run: Run, command: tuple[str, ...]
) -> None:
    account = attach(runtime, "a")
    code, out, err = run(*command)
    assert (code, out) == (2, "") and err
    account.acknowledge()
    (owner,) = picture(runtime).owners
    assert (owner.limit_bytes, owner.floor_bytes, owner.weight_wanted) == (CAPACITY, 0, 100)


def test_a_damaged_ledger_exits_with_5(runtime: Runtime, run: Run) -> None:
    attach(runtime, "a")
    runtime.device("host").ledger.write_bytes(b"x" * 70_000)
    code, _, err = run("list")
    assert code == 5 and "damaged" in err
    assert run("doctor")[0] == 5


def test_an_unsafe_runtime_directory_exits_with_1_and_a_remedy(tmp_path: Path, run: Run) -> None:
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
        "import sys, kvctl.main\n"
        "from kvctl.commands import controls, doctor, history, list\n"
        "heavy = {'torch', 'vllm', 'sglang', 'cupy', 'cuda', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
    assert doctor.run_doctor.__module__ == "kvctl.commands.doctor"
