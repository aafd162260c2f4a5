"""The history of a device: bounded, in whole lines, and never in an engine's way."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcached_core.events import Event, happened
from kvcached_core.hooks import hookimpl, plugin_manager
from kvcached_core.ledger import Runtime
from kvcached_core.ledger.file import storage
from kvcached_core.ledger.file.runtime import DeviceFolder
from kvcached_core.ledger.history import MOST_BYTES, ROTATE_BYTES, History, Reporter, read
from tests.ledger.helpers import child


@pytest.fixture
def folder(runtime: Runtime) -> DeviceFolder:
    folder = runtime.device("host")
    folder.make()
    return folder


def event(n: int, wall_seconds: float | None = None, **data: str) -> Event:
    return Event(
        "ready", float(n), float(n) if wall_seconds is None else wall_seconds, {"granules": n, **data}
    )


def counts(found: list[Event]) -> list[int]:
    return [int(seen.data["granules"]) for seen in found]


def fill(history: History, size_bytes: int, locked: bool, start: int = 0) -> int:
    """Append events of more than `size_bytes` in all; returns the number of the next."""
    text = "x" * 900
    for n in range(start, start + size_bytes // 900 + 1):
        if locked:
            history.put_aside()
        history.append(event(n, text=text))
    return start + size_bytes // 900 + 1


def test_appended_events_are_read_newest_last(folder: DeviceFolder) -> None:
    history = History(folder)
    written = [event(n, text='a "name"\n\u2028 {"kind":') for n in (1, 3, 2, 5, 4)]
    for one in written:
        history.append(one)
    assert read(folder) == sorted(written, key=lambda seen: seen.wall_seconds)
    assert counts(read(folder, limit=2)) == [4, 5]
    assert len(folder.history.read_bytes().splitlines()) == 5


def test_events_of_one_moment_keep_their_order(folder: DeviceFolder) -> None:
    for n in range(9):
        History(folder).append(event(n, wall_seconds=7.0))
    assert counts(read(folder)) == list(range(9))


def test_the_history_is_bounded_and_keeps_the_newest(folder: DeviceFolder) -> None:
    end = fill(History(folder), 5 * ROTATE_BYTES, locked=True)
    sizes = [path.stat().st_size for path in (folder.history, folder.old_history)]
    assert sum(sizes) <= 2 * ROTATE_BYTES + 2 * 1024
    seen = counts(read(folder))
    assert seen == list(range(seen[0], end))
    assert len(seen) * 900 >= ROTATE_BYTES


def test_only_the_holder_of_the_lock_puts_the_file_aside(folder: DeviceFolder) -> None:
    history = History(folder)
    end = fill(history, 2 * ROTATE_BYTES, locked=False)
    assert not folder.old_history.exists()
    assert MOST_BYTES - 1024 <= folder.history.stat().st_size <= MOST_BYTES
    history.put_aside()
    history.append(event(end))
    assert counts(read(folder))[-1] == end
    assert counts(read(folder))[:-1] == list(range(len(read(folder)) - 1))


def test_lines_that_are_in_both_files_are_seen_once(folder: DeviceFolder) -> None:
    for n in range(3):
        History(folder).append(event(n))
    folder.old_history.write_bytes(folder.history.read_bytes())
    History(folder).append(event(3))
    assert counts(read(folder)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000,
        b'{"kind":"ready"}', b'{"kind":[],"at_seconds":1,"wall_seconds":1}',
        b'{"kind":"later","at_seconds":1,"wall_seconds":1}',
        b'{"kind":"ready","at_seconds":null,"wall_seconds":1}',
        b'{"kind":"ready","at_seconds":1,"wall_seconds":NaN}',
        b'{"kind":"ready","at_seconds":1,"wall_seconds":1e300}',
        b'{"kind":"ready","at_seconds":1,"wall_seconds":1,"granules":{"a":1}}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_event_is_passed_over(folder: DeviceFolder, line: bytes) -> None:
    history = History(folder)
    history.append(event(1))
    with folder.history.open("ab") as file:
        file.write(line + b"\n")
    history.append(event(2))
    assert counts(read(folder)) == [1, 2]


@given(damage=st.lists(st.tuples(st.integers(0, 399), st.binary(min_size=1, max_size=9)), max_size=9))
@settings(max_examples=200, deadline=None)
def test_no_damage_makes_reading_fail_or_hides_what_comes_after(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]]
) -> None:
    folder = DeviceFolder(tmp_path_factory.mktemp("device"), 0o600)
    for n in range(5):
        History(folder).append(event(n))
    data = bytearray(folder.history.read_bytes())
    for at, what in damage:
        data[at : at + len(what)] = what
    folder.history.write_bytes(data)
    History(folder).append(event(99))
    assert event(99) in read(folder)


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_events_and_nothing_else(folder: DeviceFolder) -> None:
    history = History(folder)
    history.append(event(1))
    with files_of_at_most(folder.history.stat().st_size + 30):
        history.append(event(2))  # cut
        history.append(event(3))  # no part of it is written
    assert folder.history.stat().st_size == len(folder.history.read_bytes().splitlines()[0]) + 31
    history.append(event(4))
    history.append(event(5))
    assert counts(read(folder)) == [1, 4, 5]


def test_without_its_folder_events_are_lost_and_nothing_is_made(runtime: Runtime) -> None:
    folder = runtime.device("gone")
    history = History(folder)
    history.put_aside()
    history.append(event(1))
    assert read(folder) == [] and not folder.path.exists()


def test_a_link_or_fifo_in_its_place_is_neither_followed_nor_waited_for(
    folder: DeviceFolder, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.touch()
    folder.history.symlink_to(other)
    History(folder).append(event(1))
    assert other.stat().st_size == 0
    folder.history.unlink()
    os.mkfifo(folder.history)
    History(folder).append(event(1))
    assert read(folder) == []


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_the_file_has_the_mode_of_the_ledger_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    folder = DeviceFolder(tmp_path, mode)
    before = os.umask(0o077)
    try:
        History(folder).append(event(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.history.stat().st_mode) == mode


def test_every_change_is_a_write_point(folder: DeviceFolder) -> None:
    passed: list[str] = []
    history = History(folder)
    fill(history, ROTATE_BYTES, locked=False)
    storage.set_write_hook(passed.append)
    try:
        history.append(event(1))
        history.put_aside()
        history.append(event(2))
    finally:
        storage.set_write_hook(None)
    assert passed == ["history", "history.old", "history"]


def test_lines_of_several_processes_stay_whole_while_files_take_turns(runtime: Runtime) -> None:
    folder = runtime.device("host")
    folder.make()
    body = """
from kvcached_core.ledger.history import History
from kvcached_core.ledger.file.lock import LedgerLock
from tests.ledger.test_history import event
folder = runtime.device("host")
history, lock = History(folder), LedgerLock(folder.lock)
sys.stdin.readline()
for n in range(700):
    history.append(event(n, who=instance, text="x" * 300))
    if n % 10 == 0:
        with lock.held(): history.put_aside()
say("done")
"""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child(runtime, body, f"c{n}")) for n in range(3)]
        for process in children:
            process.resume()
        assert [process.read_line() for process in children] == ["done"] * 3
    lines = folder.history.read_bytes().splitlines() + folder.old_history.read_bytes().splitlines()
    found = read(folder)
    assert len(found) == len(lines)  # no line is damaged
    for who in ("c0", "c1", "c2"):
        assert max(counts([seen for seen in found if seen.data["who"] == who])) == 699


class Observer:
    def __init__(self) -> None:
        self.seen: list[Event] = []

    @hookimpl
    def kvcached_event(self, event: Event) -> None:
        self.seen.append(event)


@pytest.fixture
def observer() -> Iterator[Observer]:
    observer = Observer()
    plugin_manager().register(observer)
    yield observer
    plugin_manager().unregister(observer)


def test_a_report_goes_to_the_history_and_to_observers(folder: DeviceFolder, observer: Observer) -> None:
    Reporter(folder, lambda: "llama", lambda: 3).report("lease", granted_bytes=5)
    (seen,) = observer.seen
    who = {"device": "host", "name": "llama", "slot": 3}
    assert (seen.kind, seen.data) == ("lease", {**who, "granted_bytes": 5})
    assert read(folder) == [seen]


def test_no_observer_is_called_under_the_lock(folder: DeviceFolder, observer: Observer) -> None:
    reporter = Reporter(folder, lambda: "llama", lambda: 3)
    reporter.report("demand", locked=True, unmet_bytes=5)
    reporter.report("reclaim", locked=True, name="qwen", slot=4, target_bytes=1)
    assert observer.seen == [] and read(folder) == []
    reporter.flush()
    assert [(seen.kind, seen.data["name"], seen.data["slot"]) for seen in observer.seen] == [
        ("demand", "llama", 3),
        ("reclaim", "qwen", 4),
    ]
    reporter.report("lease", locked=True)
    reporter.report("ready")
    assert [seen.kind for seen in observer.seen[2:]] == ["lease", "ready"]
    assert read(folder) == observer.seen


def test_a_report_without_observers_keeps_no_events(folder: DeviceFolder) -> None:
    reporter = Reporter(folder, lambda: "llama", lambda: 3)
    reporter.report("lease", locked=True)
    reporter.flush()
    observer = Observer()
    plugin_manager().register(observer)
    try:
        reporter.flush()
        assert observer.seen == []
    finally:
        plugin_manager().unregister(observer)
    assert [seen.kind for seen in read(folder)] == ["lease"]


def test_the_time_of_an_event_is_that_of_both_clocks() -> None:
    first, second = happened("start", {}), happened("start", {})
    assert first.at_seconds <= second.at_seconds
    assert second.wall_seconds > 1.7e9
