"""Memory of the machine: the least of system, control groups and capacity."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.driver.host import HostDriver
from kvcached_core.driver.machine import Machine
from kvcached_core.errors import CapacityError


def write_tree(root: Path, files: dict[str, str]) -> Machine:
    """Return a machine whose /proc and control groups are these files."""
    meminfo = "MemTotal:       1000 kB\nMemFree:  100 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


def test_memory_is_the_least_of_system_group_and_capacity(tmp_path: Path) -> None:
    kib = 1024
    bare = write_tree(tmp_path / "bare", {"proc/sys/vm/max_map_count": "1000\n"})
    assert bare.memory() == MemoryInfo(600 * kib, 1000 * kib)
    assert bare.max_mappings() == 500
    v2 = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1\n",
        "sys/fs/cgroup/a/memory.max": f"{500 * kib}\n",
        "sys/fs/cgroup/a/memory.current": f"{300 * kib}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {50 * kib}\n",
    }
    assert write_tree(tmp_path / "v2", v2).memory() == MemoryInfo(250 * kib, 500 * kib)
    v1 = {
        "proc/self/cgroup": "3:cpu:/x\n4:memory:/not/visible/inside\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{400 * kib}",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{500 * kib}",
    }
    machine = write_tree(tmp_path / "v1", v1)
    assert machine.memory() == MemoryInfo(0, 400 * kib)
    full, capped = HostDriver(100 * kib, machine=machine), HostDriver(300 * kib, machine=bare)
    with pytest.raises(CapacityError):
        full.create(4096)
    assert capped.memory() == MemoryInfo(300 * kib, 300 * kib)
    full.close()
    capped.close()
