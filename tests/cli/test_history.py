"""kvctl history."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.events import Event, Kind, Value
from kvcached_core.ledger import Runtime
from kvcached_core.ledger.history import History
from tests.cli.conftest import Run
from tests.ledger.helpers import GRANULE, attach

Write = Callable[..., None]


@pytest.fixture
def write(runtime: Runtime) -> Write:
    """Return a function that writes an event at second n to the history of an existing device."""

    def call(n: float, kind: Kind, device: str = "host", name: str = "m", **data: Value) -> None:
        who: dict[str, Value] = {"device": device, "name": name, "slot": 0}
        History(runtime.device(device)).append(Event(kind, n, 1e9 + n, who | data))

    return call


def make_devices(runtime: Runtime, *uuids: str) -> None:
    """Make ledgers with one engine each and empty histories."""
    for uuid in uuids:
        attach(runtime, f"on {uuid}", device=DeviceIdentity(uuid, "test"))
        runtime.device(uuid).history.unlink(missing_ok=True)


def test_history_shows_events_newest_last(runtime: Runtime, run: Run, write: Write) -> None:
    make_devices(runtime, "host")
    code, out, err = run("history")
    assert (code, out) == (0, "") and "there are no events yet" in err
    write(1, "start", waited_seconds=1.25, starting_bytes=3 * GRANULE)
    write(3, "reclaim", name="qwen", target_bytes=2 * GRANULE, must_bytes=0, taker="m")
    write(2, "ready", granules=4, ready_bytes=4 * GRANULE)
    code, out, err = run("history")
    assert (code, err) == (0, "")
    header, *lines = (line.strip().split(maxsplit=4) for line in out.splitlines())
    assert header == ["TIME", "NAME", "EVENT", "DATA"]
    assert [line[2:] for line in lines] == [
        ["m", "start", "waited 1.25 s, starting 3 MiB"],
        ["m", "ready", "granules 4, ready 4 MiB"],
        ["qwen", "reclaim", "target 2 MiB, must 0 B, taker m"],
    ]
    assert [line[1][-7:] for line in lines] == [":41.000", ":42.000", ":43.000"]


def test_history_shows_only_the_newest_events_and_the_named_engines(
    runtime: Runtime, run: Run, write: Write
) -> None:
    make_devices(runtime, "host")
    for n in range(60):
        write(n, "ready", name="qwen" if n % 2 else "llama", granules=n)

    def granules(*arguments: str) -> list[int]:
        return [event["granules"] for event in json.loads(run("history", "--json", *arguments)[1])["events"]]

    assert granules() == list(range(10, 60))
    assert granules("-n", "2") == [58, 59]
    assert granules("-n", "2", "llama") == [56, 58]
    assert granules("gone") == []


def test_history_of_several_devices_has_a_device_column(runtime: Runtime, run: Run, write: Write) -> None:
    make_devices(runtime, "host", "GPU-9")
    write(1, "evict", device="host", granules=1)
    write(2, "evict", device="GPU-9", granules=2)
    write(3, "evict", device="host", granules=3)
    lines = [line.split()[2:] for line in run("history")[1].splitlines()[1:]]
    assert [line[0] for line in lines] == ["1", "0", "1"]  # places as kvctl list shows them
    only = run("history", "--device", "GPU-9")[1].splitlines()
    assert len(only) == 2 and only[1].split()[3:] == ["evict", "granules", "2"] and "DEVICE" not in only[0]
    assert run("history", "--device", "nope")[0] == 2


def test_history_json_keeps_every_number(runtime: Runtime, run: Run, write: Write) -> None:
    make_devices(runtime, "host")
    write(1, "lease", granted_bytes=5, leased_bytes=7)
    data = json.loads(run("history", "--json")[1])
    assert data == {
        "version": 1,
        "events": [
            {
                "kind": "lease", "at_seconds": 1.0, "wall_seconds": 1e9 + 1, "device": "host", "name": "m",
                "slot": 0, "granted_bytes": 5, "leased_bytes": 7,
            }
        ],
    }  # fmt: skip


def test_history_without_a_runtime_directory_is_empty(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_RUNTIME_DIR", str(tmp_path / "none"))
    code, out, _ = run("history", "--json")
    assert (code, json.loads(out)["events"]) == (0, [])
