"""Memory that this process may use on this machine: system, control groups, number of mappings."""

from __future__ import annotations

import platform
from pathlib import Path

from kvcached_core.driver.base import MemoryInfo
from kvcached_core.units import KIB

_DEFAULT_MAX_MAPPINGS = 65530  # Linux: DEFAULT_MAX_MAP_COUNT


class Machine:
    """Reads /proc and the control group file systems below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._groups = list(self._memory_groups())

    def memory(self) -> MemoryInfo:
        """Return free and total memory: the least of the system and every enclosing control group."""
        system = self._system()
        groups = [info for group in self._groups if (info := _group_memory(group)) is not None]
        infos = [system, *groups]
        return MemoryInfo(min(i.free_bytes for i in infos), min(i.total_bytes for i in infos))

    def name(self) -> str:
        """Return the machine's name, for people."""
        return f"{platform.node() or 'host'} ({platform.machine()})"

    def max_mappings(self) -> int:
        """Return half of the mappings that a process may have; the engine needs the other half."""
        text = _read(self._root / "proc/sys/vm/max_map_count")
        return (int(text) if text else _DEFAULT_MAX_MAPPINGS) // 2

    def _system(self) -> MemoryInfo:
        text = _read(self._root / "proc/meminfo") or ""
        fields = dict(line.replace(":", " ").split()[:2] for line in text.splitlines() if line)
        return MemoryInfo(int(fields["MemAvailable"]) * KIB, int(fields["MemTotal"]) * KIB)

    def _memory_groups(self) -> list[Path]:
        """Return the folders of this process's memory control group and of its ancestors (v1 and v2)."""
        found = []
        for line in (_read(self._root / "proc/self/cgroup") or "").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base = self._root / "sys/fs/cgroup" / controllers
            group = base / name.lstrip("/")
            # In a container the name may be the outer one: then this process's group is the mount's root.
            if ".." in group.parts or not group.is_dir():
                group = base
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
        return found


def _group_memory(group: Path) -> MemoryInfo | None:
    """Return a control group's memory, or None if it has no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _read(group / limit_name), _read(group / used_name)
        if limit and used and limit.isdigit():
            # The kernel drops inactive file cache before it refuses memory, so this cache counts as free.
            busy = int(used) - _inactive_file_bytes(group)
            return MemoryInfo(max(0, int(limit) - busy), int(limit))
    return None


def _inactive_file_bytes(group: Path) -> int:
    stat = dict(line.split(maxsplit=1) for line in (_read(group / "memory.stat") or "").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
