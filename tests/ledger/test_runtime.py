"""Runtime directories that are accepted or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcached_core.errors import LedgerError
from kvcached_core.ledger import Account, Runtime, snapshot
from tests.ledger.helpers import attach


def test_the_runtime_directory_is_made_for_the_user_only(tmp_path: Path) -> None:
    runtime = Runtime.open(environ={"KVCACHED_RUNTIME_DIR": str(tmp_path / "a" / "b")})
    assert runtime.path == tmp_path / "a" / "b"
    assert runtime.path.stat().st_mode & 0o777 == 0o700
    assert Runtime.open(environ={}, create=False).path == Path(f"/dev/shm/kvcached-{os.getuid()}")
    assert not Runtime.open(tmp_path / "none", create=False).path.exists()
    assert snapshot(Runtime.open(tmp_path / "none", create=False)) == []


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o720, 0o770, 0o2777, 0o1777])
def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(LedgerError, match=f"has mode {mode:04o}.*chmod 700 {folder}"):
        Runtime.open(folder)


def test_a_runtime_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path if os.getuid() == 0 else Path("/usr")
    if os.getuid() == 0:
        os.chown(folder, 4242, -1)
    try:
        with pytest.raises(LedgerError, match=r"belongs to user \d+, not to \d+: set KVCACHED_RUNTIME_DIR"):
            Runtime.open(folder)
    finally:
        if os.getuid() == 0:
            os.chown(folder, 0, -1)


def test_a_file_in_place_of_the_runtime_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="is not a directory"):
        Runtime.open(tmp_path / "file")


def test_a_full_file_system_is_an_error_and_leaves_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "posix_fallocate", full)
        with pytest.raises(LedgerError, match="No space left on device"):
            attach(runtime, "a")
    assert set(os.listdir(runtime.device("host").path)) == {"lock"}
    assert isinstance(attach(runtime, "a"), Account)
