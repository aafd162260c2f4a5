"""devkit.process_groups: kill_group() leaves no process of the group and no shared memory of its own."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devkit.polling import until
from devkit.process_groups import SHARED_MEMORY, kill_group, living, shared_memory_of, table

# A program with a shared memory segment that its child maps too, and a semaphore that is mapped under a name
# that no longer exists. No resource tracker knows of either.
PARENT = """
import _multiprocessing, mmap, signal, subprocess, sys
name, child = sys.argv[1:]
with open(f"/dev/shm/{name}", "w+b") as file:
    file.truncate(4096)
    segment = mmap.mmap(file.fileno(), 4096)
semaphore = _multiprocessing.SemLock(1, 1, 1, f"/{name}", False)
subprocess.Popen([sys.executable, "-c", child, name])
signal.pause()
"""
CHILD = """
import mmap, signal, sys
with open(f"/dev/shm/{sys.argv[1]}", "r+b") as file:
    segment = mmap.mmap(file.fileno(), 4096)
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[int]:
    """Yield the process group of two processes whose shared memory files all have this test's name."""
    words = [sys.executable, "-c", PARENT, _name(request), CHILD]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in _left(request):
            path.unlink()


def _name(request: pytest.FixtureRequest) -> str:
    return f"kvt-groups-{os.getpid()}-{request.node.name[-20:]}"


def _left(request: pytest.FixtureRequest) -> set[Path]:
    name = _name(request)
    return {path for path in SHARED_MEMORY.iterdir() if path.name in (name, f"sem.{name}")}


def test_a_killed_group_leaves_nothing_behind(group: int, request: pytest.FixtureRequest) -> None:
    assert len(living(group)) == 2
    assert shared_memory_of(group) == _left(request) and len(_left(request)) == 2
    kill_group(group)
    assert not living(group) and not _left(request)
    assert table()[group].zombie, "whoever started it collects it"
    kill_group(group)  # may be repeated


def test_noted_files_are_removed_also_after_their_processes_have_ended(
    group: int, request: pytest.FixtureRequest
) -> None:
    noted = shared_memory_of(group)
    os.killpg(group, signal.SIGKILL)
    until(lambda: not living(group), 5, "all have ended")
    assert _left(request) == noted
    kill_group(group, noted)
    assert not _left(request)


def test_a_file_that_another_process_maps_stays(group: int, request: pytest.FixtureRequest) -> None:
    with (SHARED_MEMORY / _name(request)).open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        kill_group(group)
        assert {path.name for path in _left(request)} == {_name(request)}
