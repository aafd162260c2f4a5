"""Every command as a process, against ledgers with live engines: text, JSON, pipes, signals, deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvcached_core.ledger import Runtime, snapshot
from kvcached_core.ledger.file.storage import LedgerFile
from kvctl.command_definitions import COMMANDS
from kvctl.commands.completion import SCRIPTS
from tests.cli.owner import CAPACITY, PAGE, SIZE
from tests.cli.process import ROOT, OwnerProcess, environment, kvctl, line_of, owner, start, until
from tests.cli.schemas import SCHEMAS, validate
from tests.cli.terminal import terminal

pytestmark = pytest.mark.alone

CALLS = {
    "list": ["list"], "limit": ["limit", "llama", "50%"], "limit-percent": ["limit-percent", "llama", "60"],
    "floor": ["floor", "llama", "2M"], "weight": ["weight", "llama", "7"], "trim": ["trim", "llama"],
    "delete": ["delete", "llama", "--force"], "watch": ["watch", "--count", "1"],
    "kvtop": ["kvtop", "--once"], "history": ["history"], "check": ["check"], "doctor": ["doctor"],
    "export": ["export"], "completion": ["completion", "bash"], "help": ["help", "limit"],
}  # fmt: skip


def _run(
    command: list[str], runtime: Runtime, stdout: Any = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run any command in an environment in which kvctl finds its sources and the ledgers."""
    return subprocess.run(
        command, env=environment(runtime), stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
    )


@pytest.fixture
def llama(runtime: Runtime) -> Iterator[OwnerProcess]:
    """A live engine that holds 4 granules for requests and 8 in its cache."""
    with owner(runtime, "llama") as engine:
        assert engine.say(f"serve {4 * SIZE} {8 * SIZE}") == "done"
        yield engine


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_in_text_and_in_json(runtime: Runtime, llama: OwnerProcess, command: str) -> None:
    done = kvctl(*CALLS[command], runtime=runtime)
    good = (0, 1) if command == "doctor" else (0,)  # its findings depend on the machine
    assert done.returncode in good and done.stdout and "\x1b" not in done.stdout, done.stderr
    done = kvctl(*CALLS[command], "--json", runtime=runtime)
    assert done.returncode in good, done.stderr
    validate(command, json.loads(done.stdout))
    assert set(SCHEMAS) == set(CALLS) == {each.name for each in COMMANDS}
    help_text = kvctl(command, "--help", runtime=runtime).stdout
    assert "examples:" in help_text and "--runtime-dir" in help_text
    assert llama.process.poll() is None


def test_a_limit_takes_effect_and_the_kernel_counts_the_same(runtime: Runtime, llama: OwnerProcess) -> None:
    done = kvctl("limit", "llama", "6MiB", "--json", runtime=runtime)
    (rank,) = json.loads(done.stdout)["ranks"]
    assert done.returncode == 0 and rank["leased_bytes"] <= 6 * PAGE
    assert int(llama.say("memfd")) == rank["leased_bytes"], "what is promised exists, and nothing else"
    done = kvctl("limit", "llama", "2MiB", "--wait", "0.2", runtime=runtime)
    assert done.returncode == 4 and "requests still use more" in done.stderr


def test_trim_gives_back_spare_and_cache(runtime: Runtime, llama: OwnerProcess) -> None:
    before = int(llama.say("memfd"))
    done = kvctl("trim", "llama", "--json", runtime=runtime)
    (rank,) = json.loads(done.stdout)["ranks"]
    assert done.returncode == 0 and rank["holds"] and rank["before_bytes"] == before
    assert rank["given_bytes"] >= 7 * PAGE
    (device,) = snapshot(runtime)
    assert device.owners[0].used_bytes >= 4 * PAGE and int(llama.say("memfd")) == device.ready_bytes
    assert "kvctl trim" in kvctl("history", runtime=runtime).stdout


def test_a_stopped_engine_exits_with_4_and_complies_once_it_continues(
    runtime: Runtime, llama: OwnerProcess
) -> None:
    llama.signal(signal.SIGSTOP)
    for call in (["trim", "llama"], ["limit", "llama", "8M"], ["weight", "llama", "3"]):
        done = kvctl(*call, "--wait", "0.1", runtime=runtime)
        assert done.returncode == 4 and done.stdout and done.stderr.startswith("kvctl: ")
        assert kvctl(*call, "--no-wait", runtime=runtime).returncode == 0
    llama.signal(signal.SIGCONT)
    assert kvctl("limit", "llama", "8M", runtime=runtime).returncode == 0
    assert int(llama.say("memfd")) <= 8 * PAGE


def test_an_engine_that_dies_meanwhile_exits_with_1_and_leaves_a_slot_to_delete(
    runtime: Runtime, llama: OwnerProcess
) -> None:
    llama.signal(signal.SIGSTOP)
    waiting = start("limit", "llama", "2M", "--wait", "60", runtime=runtime)
    trimming = start("trim", "llama", "--wait", "60", runtime=runtime)
    until(lambda: snapshot(runtime)[0].owners[0].limit_wanted == 2 << 20, "the limit is set")
    until(lambda: snapshot(runtime)[0].owners[0].target_bytes > 0, "it is asked")
    llama.end()
    for process in (waiting, trimming):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and b"ended" in out and b"llama ended in the meantime" in err
    assert "ended" in kvctl("list", runtime=runtime).stdout
    done = kvctl("delete", "llama", "--json", runtime=runtime)
    assert done.returncode == 0 and [s["result"] for s in json.loads(done.stdout)["slots"]] == ["removed"]
    assert kvctl("delete", "llama", runtime=runtime).returncode == 3


def test_delete_of_a_running_engine_is_refused_and_with_force_resets_its_settings(
    runtime: Runtime, llama: OwnerProcess
) -> None:
    kvctl("limit", "llama", "20M", runtime=runtime)
    kvctl("weight", "llama", "9", runtime=runtime)
    done = kvctl("delete", "llama", runtime=runtime)
    assert done.returncode == 1 and "kept" in done.stdout and "kvctl delete --force llama" in done.stderr
    before = snapshot(runtime)[0].owners[0]
    assert kvctl("delete", "llama", "--force", runtime=runtime).returncode == 0
    after = snapshot(runtime)[0].owners[0]
    assert (after.limit_wanted, after.weight_wanted) == (CAPACITY, 100)
    assert after.live and after.leased_bytes == before.leased_bytes == int(llama.say("memfd"))


def test_concurrent_changes_all_hold_in_the_end(runtime: Runtime, llama: OwnerProcess) -> None:
    calls = [["limit", "llama", f"{size}M"] for size in (20, 30)] + [["weight", "llama", "7"]] * 2
    processes = [start(*call, "--json", runtime=runtime) for call in calls]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and json.loads(out)["holds"], err
    (engine,) = snapshot(runtime)[0].owners
    assert engine.limit_wanted in (20 << 20, 30 << 20) and engine.limit_applied == engine.limit_wanted
    assert engine.limit_wanted_generation == engine.limit_applied_generation == 2
    assert llama.process.poll() is None


def test_check_exits_with_5_if_an_invariant_is_broken(runtime: Runtime, llama: OwnerProcess) -> None:
    done = kvctl("check", runtime=runtime)
    assert done.returncode == 0 and "ok" in done.stdout and done.stderr == ""
    llama.signal(signal.SIGSTOP)
    file = LedgerFile(runtime.device("host").ledger)
    file.set(0, "ready_bytes", 40 << 20)
    file.close()
    done = kvctl("check", runtime=runtime)
    assert done.returncode == 5 and "error" in done.stdout and "kvctl: I2: llama rank 0" in done.stderr
    assert kvctl("list", runtime=runtime).returncode == 5


def test_watch_continues_until_it_is_interrupted(runtime: Runtime, llama: OwnerProcess) -> None:
    watching = start("watch", "-n", "0.1", "--json", runtime=runtime)
    for _ in range(3):
        data = json.loads(line_of(watching.stdout))
        validate("watch", data)
        assert data["devices"][0]["engines"][0]["name"] == "llama"
    llama.end()
    until(lambda: "ended" in line_of(watching.stdout), "it goes on when an engine has died")
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0, b""), "that is the way to leave"
    assert all(json.loads(line) for line in out.splitlines())


def test_ctrl_c_while_waiting_exits_with_130_and_the_limit_stays(
    runtime: Runtime, llama: OwnerProcess
) -> None:
    waiting = start("limit", "llama", "1M", "--wait", "60", runtime=runtime)
    until(lambda: snapshot(runtime)[0].owners[0].limit_applied == 1 << 20, "the limit is acknowledged")
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out, err) == (130, b"", b"")
    assert llama.process.poll() is None


@pytest.mark.parametrize(
    "call", ["list", "list --json", "history", "export", "help", "watch -n 0.1", "kvtop --once", "doctor",
             "completion bash"],
)  # fmt: skip
def test_a_closed_pipe_is_no_error(runtime: Runtime, llama: OwnerProcess, call: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = _run([sys.executable, "-m", "kvctl", *call.split()], runtime, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "") and llama.process.poll() is None


def test_output_that_cannot_be_written_exits_with_1(runtime: Runtime, llama: OwnerProcess) -> None:
    with open("/dev/full", "w") as full:
        done = _run([sys.executable, "-m", "kvctl", "list"], runtime, stdout=full)
    assert done.returncode == 1 and done.stderr == "kvctl: output: No space left on device\n"
    closed = f"exec >&- 2>&-; exec {sys.executable} -m kvctl list"
    assert _run(["bash", "-c", closed], runtime).returncode == 0
    assert llama.process.poll() is None


def test_colours_appear_on_terminals_or_on_request(runtime: Runtime, llama: OwnerProcess) -> None:
    colour = "\x1b["
    assert colour not in kvctl("list", runtime=runtime).stdout
    assert colour in kvctl("list", "--color", "always", runtime=runtime).stdout
    for before, coloured in (("", True), ("NO_COLOR=1", False), ("TERM=dumb", False)):
        with terminal(f"env {before} {sys.executable} -m kvctl list; cat", runtime) as shown:
            shown.wait_for("busy")
            assert ("\x1b[32m" in shown.screen(colours=True)) == coloured, before
    assert llama.process.poll() is None


def test_a_terminal_without_utf8_gets_ascii(runtime: Runtime, llama: OwnerProcess) -> None:
    for call in (["list"], ["kvtop", "--once"]):
        done = kvctl(*call, runtime=runtime, PYTHONIOENCODING="ascii")
        assert done.returncode == 0 and done.stdout.isascii() and "#" in done.stdout
    assert llama.process.poll() is None


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_completion_scripts_work(runtime: Runtime, shell: str) -> None:
    script = kvctl("completion", shell, runtime=runtime).stdout
    assert "kvctl --complete --" in script
    if shell == "bash":
        code = f'kvctl() {{ {sys.executable} -m kvctl "$@"; }}\n{script}\n' + (
            "COMP_WORDS=(kvctl limit ''); COMP_CWORD=2; _kvctl; echo ${COMPREPLY[*]}\n"
            "COMP_WORDS=(kvctl li); COMP_CWORD=1; _kvctl; echo ${COMPREPLY[*]}\n"
        )
        with owner(runtime, "llama"):
            done = _run(["bash", "-c", code], runtime)
        assert done.stdout.splitlines() == ["llama", "limit limit-percent list"], done.stderr


def test_kvctl_starts_fast_and_imports_nothing_heavy(runtime: Runtime) -> None:
    code = (
        "import resource, sys\n"
        "from kvctl.main import main\n"
        "main(['list'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, *sys.modules)"
    )
    done = _run([sys.executable, "-c", code], runtime)
    seconds, *modules = done.stdout.split()
    # CPU seconds, so that other work on the machine does not count.
    assert float(seconds) < 0.3
    heavy = {"torch", "vllm", "numpy", "textual", "prompt_toolkit", "prometheus_client", "pluggy", "asyncio"}
    assert not heavy & set(modules)
    assert (ROOT / "cli").is_dir()
