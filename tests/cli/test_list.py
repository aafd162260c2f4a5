"""kvctl list."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from kvcached_core.driver.base import DeviceIdentity, MemoryInfo
from kvcached_core.ledger import Runtime, SchedulerView
from kvcached_core.ledger.file.storage import LedgerFile
from kvctl import output
from tests.cli.conftest import Run
from tests.ledger.helpers import CAPACITY, GRANULE, attach, die, engine_usage, hold


def test_list_without_ledgers_is_empty_and_creates_nothing(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "none"
    code, out, err = run("list", "--runtime-dir", str(folder))
    assert (code, out) == (0, "") and "no engine is running" in err
    assert run("list", "--json", "--runtime-dir", str(folder))[:2] == (
        0,
        '{\n  "version": 1,\n  "devices": []\n}\n',
    )
    assert not folder.exists()


def names(out: str) -> list[str]:
    """Return the names of the engines in the list, without device lines and headers."""
    return [line.split()[0] for line in out.splitlines() if line and not re.match(r"\d+: |NAME |   \S", line)]


def test_list_shows_the_memory_that_each_engine_holds(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a", name="llama", limit_bytes=32 * GRANULE, floor_bytes=2 * GRANULE)
    attach(runtime, "b", name="qwen", device=DeviceIdentity("GPU-1234", "gpu"))
    hold(account, 20)
    view = SchedulerView.find(runtime, "a", 1)
    view.publish(engine_usage(used_blocks=12, cached_blocks=8, stranded_blocks=4))
    view.close()
    code, out, err = run("list")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("0: GPU-1234 capacity 64 MiB, leased 0 B") and lines[4] == ""
    assert lines[5:] == [
        "1: host capacity 64 MiB, leased 20 MiB, free 64 MiB, outside 0 B",
        "██▓░░░░░░░░░" + "·" * 28 + " 31.2% leased █used ▓cached ░spare ▞other",
        "NAME RANK USED CACHED SPARE HELD FLOOR LIMIT WEIGHT DEMAND ASKED STATE",
        "llama 0 3M 2M 14M 20M 2M 32M 100 - - running",
    ]
    assert lines[3] == "qwen 0 0 0 0 0 0 device 100 - - running"
    assert names(run("list", "qwen")[1]) == ["qwen"]
    for device in ("GPU", "0", "GPU-1234"):
        assert names(run("list", "--device", device)[1]) == ["qwen"]


def test_list_wide_adds_engine_model_and_worker(runtime: Runtime, run: Run) -> None:
    attach(runtime, "a", name="llama")
    _, _, header, line = (" ".join(line.split()) for line in run("list", "--wide")[1].splitlines())
    assert header.endswith("STATE ENGINE MODEL WORKER")
    assert line.endswith(f"running test 1 tiny {os.getpid()}")


def test_list_shows_memory_outside_the_ledger_also_for_some_engines(runtime: Runtime, run: Run) -> None:
    first, second = attach(runtime, "a", name="llama"), attach(runtime, "b", name="qwen")
    hold(first, 4)
    first.publish(0, private_now_bytes=3 * GRANULE)
    # Of 64 MiB 55 are free at the lease: 9 are taken, 4 and 3 of them by llama, 2 by others.
    assert second.lease(5 * GRANULE, MemoryInfo(55 * GRANULE, CAPACITY)) == 5 * GRANULE
    second.created(5)
    for arguments in ((), ("qwen",)):
        assert "leased 9 MiB, free 55 MiB, outside 2 MiB" in run("list", *arguments)[1]
        (device,) = json.loads(run("list", *arguments, "--json")[1])["devices"]
        assert (device["outside_bytes"], device["leased_bytes"]) == (2 * GRANULE, 9 * GRANULE)
    second.give_back(granules_released=5)
    assert "leased 4 MiB, free 55 MiB, outside 2 MiB" in run("list")[1], (
        "what engines give back is no outsider's"
    )


def put(runtime: Runtime, slot: int, **words: int) -> None:
    """Write fields of a slot, as its owner or another engine would."""
    with contextlib.closing(LedgerFile(runtime.device("host").ledger)) as file:
        for name, value in words.items():
            file.set(slot, name, value)


def test_list_shows_unmet_demand_and_memory_asked_back(runtime: Runtime, run: Run) -> None:
    account = attach(runtime, "a")
    hold(account, 20)
    account.refuse(1536 << 10)
    later_ms, asked = time.monotonic_ns() // 1_000_000 + 60_000, 5 * GRANULE
    put(runtime, account.slot, target_bytes=20 * GRANULE - asked, asked_until_ms=later_ms)
    assert run("list")[1].split()[-3:] == ["1.5M", "5M", "short"]
    (device,) = json.loads(run("list", "--json")[1])["devices"]
    assert device["engines"][0]["asked_bytes"] == asked
    for words in ({"target_bytes": 0}, {"target_bytes": 30 * GRANULE}, {"asked_until_ms": 1}):
        put(runtime, account.slot, target_bytes=GRANULE, asked_until_ms=later_ms)
        put(runtime, account.slot, **words)
        assert run("list")[1].split()[-2] == "-"


def test_list_is_readable_at_100_columns(runtime: Runtime, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    account = attach(
        runtime, "a", name="llama-3-70b", device=DeviceIdentity("GPU-" + "8" * 36, "gpu"),
        capacity_bytes=141 * gib, limit_bytes=123 * gib + gib // 3, floor_bytes=12 * gib + gib // 3,
    )  # fmt: skip
    account.refuse(101 * gib + 1)
    monkeypatch.setattr(output, "_WIDTH_WITHOUT_TERMINAL", 100)
    lines = run("list")[1].splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 100
    row = lines[-1]
    words = ["llama-3-70b", "0", "0", "0", "0", "0", "12.3G", "123G", "100", "101G", "-", "short"]
    assert row.split() == words


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0"), (1023, "1023"), (1024, "1K"), (1 << 20, "1M"), (1536 << 10, "1.5M"), (1 << 30, "1G"),
        ((1 << 30) - 1, "1024M"), (1000 << 20, "1000M"), (99_960_000 << 10, "95.3G"),
    ],
)  # fmt: skip
def test_a_short_size_has_three_digits_and_a_letter(size_bytes: int, text: str) -> None:
    assert output.short_size(size_bytes) == text


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ({"granule_bytes": 0, "starting_bytes": 1}, "waiting"),
        ({"granule_bytes": 0}, "starting"),
        ({"demand_bytes": 1}, "short"),
        ({}, "running"),
    ],
)
def test_list_shows_an_engines_state(runtime: Runtime, run: Run, words: dict[str, int], state: str) -> None:
    account = attach(runtime, "a")
    put(runtime, account.slot, **words)
    assert run("list")[1].split()[-1] == state
    die(account)
    assert run("list")[1].split()[-1] == "ended"


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
        "name": "llama", "rank": 0, "instance": "a", "live": True, "heard": True, "state": "running",
        "ready_bytes": 20 * GRANULE, "spare_bytes": 20 * GRANULE,
        "limit_bytes": 32 * GRANULE,
        "floor_bytes": 0, "created_granules": 20,
    }  # fmt: skip
    assert {key: engine[key] for key in expected} == expected
