"""Wrong calls: each has an exit code and a message, prints no data and changes nothing."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from devkit.report import record
from kvcached_core.ledger import Runtime
from kvctl.command_definitions import COMMANDS, COMMON
from tests.cli.conftest import Run
from tests.ledger.helpers import CAPACITY, attach, picture


class Wrong(NamedTuple):
    """A call, its exit code, and a part of its message."""

    call: str
    code: int
    message: str


_DEVICES = "Known devices: 0: host"
CALLS = [
    # commands
    Wrong("lst", 2, "no command is named 'lst': did you mean 'list'?"),
    Wrong("limits m 1G", 2, "did you mean 'limit'?"),
    Wrong("kvtp", 2, "did you mean 'kvtop'?"),
    Wrong("wieght m 1", 2, "did you mean 'weight'?"),
    Wrong("LIST", 2, "the commands are: list, limit"),
    Wrong("xyzzy", 2, "the commands are: list, limit"),
    Wrong("exit", 2, "no command is named 'exit'"),
    Wrong("!ls", 2, "no command is named '!ls'"),
    Wrong("--list", 2, "--list: the command comes first, then its options"),
    Wrong("--json list", 2, "--json: the command comes first, then its options"),
    # options
    Wrong("list --wide --jsn", 2, "list has no option --jsn: did you mean --json?"),
    Wrong("list --js", 2, "list has no option --js: did you mean --json?"),
    Wrong("list --wait 5", 2, "list has no option --wait"),
    Wrong("limit m 1G --now", 2, "did you mean --no-wait?"),
    Wrong("list -x", 2, "list has no option -x"),
    Wrong("list --color", 2, "--color: expected one argument"),
    Wrong("list --color red", 2, "invalid choice: 'red'"),
    Wrong("list --runtime-dir", 2, "--runtime-dir: expected one argument"),
    Wrong("list --device", 2, "--device: expected one argument"),
    Wrong("list --device 7", 2, f"--device 7 names no device. {_DEVICES}"),
    Wrong("list --device GPU", 2, f"--device GPU names no device. {_DEVICES}"),
    Wrong("limit m 1G --device 7", 2, _DEVICES),
    Wrong("trim m --device 7", 2, _DEVICES),
    Wrong("delete m --device 7", 2, _DEVICES),
    Wrong("check --device 7", 2, _DEVICES),
    Wrong("watch --device 7 --count 1", 2, _DEVICES),
    Wrong("kvtop --once --device 7", 2, _DEVICES),
    # sizes
    Wrong("limit m", 2, "required: SIZE"),
    Wrong("limit", 2, "required: NAME, SIZE"),
    Wrong("limit m 1G 2G", 2, "limit has too many arguments: '2G'"),
    Wrong("limit m 3apples", 2, "'3apples': expected bytes as a plain number, or a number with KiB"),
    Wrong("limit m -1", 2, "'-1': expected bytes"),
    Wrong("limit m 101%", 2, "'101%': expected at most 100%"),
    Wrong("limit m 9E", 2, "'9E': expected bytes"),
    Wrong("limit m 5000000T", 2, "expected less than 4 EiB"),
    Wrong("limit m ''", 2, "'': expected bytes"),
    Wrong("limit m 0x10", 2, "'0x10': expected bytes"),
    Wrong("limit m 1,5G", 2, "'1,5G': expected bytes"),
    Wrong("limit m nan", 2, "'nan': expected bytes"),
    Wrong("limit-percent m 101", 2, "'101': expected 0 to 100"),
    Wrong("limit-percent m half", 2, "'half': expected 0 to 100"),
    Wrong("limit-percent m 5G", 2, "'5G': expected 0 to 100"),
    Wrong("limit-percent m", 2, "required: PCT"),
    Wrong("floor m x", 2, "'x': expected bytes"),
    Wrong("floor m 65MiB", 1, "a floor of 65 MiB does not fit on host: it holds 64 MiB"),
    # numbers
    Wrong("weight m 0", 2, "'0': expected 1 to 1000000"),
    Wrong("weight m -5", 2, "'-5': expected 1 to 1000000"),
    Wrong("weight m 1.5", 2, "'1.5': expected 1 to 1000000"),
    Wrong("weight m 1000001", 2, "'1000001': expected 1 to 1000000"),
    Wrong("weight m ²", 2, "expected 1 to 1000000"),
    Wrong("weight m 99999999999999999999", 2, "expected 1 to 1000000"),
    Wrong("limit m 1G --wait soon", 2, "'soon': expected 0 to 86400 seconds"),
    Wrong("limit m 1G --wait -1", 2, "'-1': expected 0 to 86400 seconds"),
    Wrong("limit m 1G --wait=-1", 2, "'-1': expected 0 to 86400 seconds"),
    Wrong("limit m 1G --wait nan", 2, "'nan': expected 0 to 86400 seconds"),
    Wrong("limit m 1G --wait inf", 2, "'inf': expected 0 to 86400 seconds"),
    Wrong("watch -n 0", 2, "'0': expected 0.1 to 86400 seconds"),
    Wrong("watch -n", 2, "-n/--interval: expected one argument"),
    Wrong("watch --count 0", 2, "'0': expected 1 to 1000000"),
    Wrong("kvtop --refresh 0.1", 2, "'0.1': expected 0.25 to 86400 seconds"),
    Wrong("history -n 0", 2, "'0': expected 1 to 1000000"),
    Wrong("history -n ten", 2, "'ten': expected 1 to 1000000"),
    Wrong("export --port 65536", 2, "'65536': expected a port, 0 to 65535"),
    Wrong("export --port http", 2, "'http': expected a port, 0 to 65535"),
    Wrong("export --port 0 --json", 2, "leave --json out"),
    Wrong("export --port 1 --bind nowhere.invalid", 1, "cannot serve at nowhere.invalid port 1"),
    # names
    Wrong("list lama", 3, "no engine is named 'lama': did you mean 'llama'? Known engines: llama, m"),
    Wrong("list m nobody", 3, "no engine is named 'nobody': Known engines: llama, m"),
    Wrong("limit lama 1G", 3, "did you mean 'llama'?"),
    Wrong("limit '' 1G", 3, "no engine is named ''"),
    Wrong("limit-percent lama 5", 3, "did you mean 'llama'?"),
    Wrong("floor lama 1M", 3, "did you mean 'llama'?"),
    Wrong("weight lama 5", 3, "did you mean 'llama'?"),
    Wrong("trim lama", 3, "did you mean 'llama'?"),
    Wrong("delete lama", 3, "did you mean 'llama'?"),
    Wrong("watch lama", 3, "did you mean 'llama'?"),
    Wrong("kvtop lama", 3, "did you mean 'llama'?"),
    Wrong("trim", 2, "required: NAME"),
    Wrong("delete", 2, "required: NAME"),
    # the rest
    Wrong("kvtop", 1, "kvtop needs a terminal: use kvtop --once"),
    Wrong("kvtop --json", 2, "kvtop --json needs --once"),
    Wrong("completion", 2, "required: shell"),
    Wrong("completion tcsh", 2, "invalid choice: 'tcsh'"),
    Wrong("help lst", 2, "did you mean 'list'?"),
    Wrong("doctor now", 2, "doctor has too many arguments: 'now'"),
    Wrong("check m", 2, "check has too many arguments: 'm'"),
    Wrong("list --runtime-dir /dev/null", 1, "runtime directory /dev/null is not a directory"),
]


@pytest.mark.parametrize("wrong", CALLS, ids=[wrong.call for wrong in CALLS])
def test_a_wrong_call(runtime: Runtime, run: Run, wrong: Wrong) -> None:
    first, second = attach(runtime, "a"), attach(runtime, "b", name="llama")
    words = [word.strip("'") if word == "''" else word for word in wrong.call.split()]
    code, out, err = run(*words)
    assert (code, out) == (wrong.code, "") and wrong.message in err
    assert err.startswith("kvctl: ") and err.count("\n") == 1, "one line for people"
    for account in (first, second):
        account.acknowledge()
    owners = picture(runtime).owners
    assert {(o.limit_bytes, o.floor_bytes, o.weight_wanted) for o in owners} == {(CAPACITY, 0, 100)}
    record("kvctl.wrong_calls", 1)


def test_every_command_has_wrong_calls() -> None:
    assert len({wrong.call for wrong in CALLS}) >= 60
    missing = {command.name for command in COMMANDS} - {wrong.call.split()[0] for wrong in CALLS}
    assert missing == set() and len(COMMON) == 4
