"""kvctl doctor."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from kvcached_core.driver.base import DeviceIdentity
from kvcached_core.ledger import Runtime
from kvctl import machine_checks
from tests.cli.conftest import Run
from tests.ledger.helpers import attach, child, die, files


def test_the_doctor_shows_ranks_open_files_and_every_setting(
    runtime: Runtime, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_SPARE", "32MiB")
    die(attach(runtime, "dead", name="ghost"))
    with child(runtime, "account = attach(runtime, instance)\nsay('here')\nsys.stdin.readline()") as owner:
        assert owner.read_line() == "here"
        attach(runtime, "late", name="late", device=DeviceIdentity("GPU-9", "gpu"))
        code, out, _ = run("doctor", "--json")
        pid = owner.process.pid
    data = json.loads(out)
    texts = "\n".join(finding["text"] for finding in data["checks"])
    assert code in (0, 1) and data["version"] == 1
    assert f"m rank 0, slot 0, running, worker {pid}" in texts
    assert f"{pid} (python" in texts
    settings = {setting["name"]: (setting["value"], setting["source"]) for setting in data["settings"]}
    assert settings["spare"] == ("32MiB", "KVCACHED_SPARE")
    assert settings["enabled"] == ("0", "default") and "limit" in settings
    die(attach(runtime, "dead", name="ghost"))
    code, out, _ = run("doctor")
    assert "ghost rank 0, slot 0, ended: removed at the next engine start or kvctl limit on its device" in out
    assert "slot-00.owner" in files(runtime)


def test_the_doctor_finds_an_illegal_setting(
    run: Run, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_LIMIT", "much")
    code, out, _ = run("doctor")
    assert code == 1 and "KVCACHED_LIMIT='much'" in out


def make_distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.mark.parametrize(
    ("engine", "plugin", "group", "variable"),
    [
        ("vLLM", "vllm-kvcached", "vllm.general_plugins", "VLLM_PLUGINS"),
        ("SGLang", "sglang-kvcached", "sglang.srt.plugins", "SGLANG_PLUGINS"),
    ],
)
def test_the_doctor_finds_a_plugin_that_its_engine_does_not_load(
    engine: str, plugin: str, group: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_distribution(
        tmp_path, plugin, "0.0.7", f"[{group}]\nkvcached = {plugin.replace('-', '_')}:register\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(variable, "other")
    found = {(finding.status, finding.text.split(":")[0]) for finding in machine_checks.check_packages()}
    assert ("info", group) in found
    assert ("error", f"{variable}='other' keeps {engine} from loading kvcached") in found


def test_the_doctor_finds_an_engine_without_its_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    make_distribution(tmp_path, "sglang", "0.5.23")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [
        finding.text
        for finding in machine_checks.check_packages()
        if finding.status == "warning" and "SGLang" in finding.text
    ] == ["SGLang is installed and sglang-kvcached is not: run pip install sglang-kvcached"]


def test_the_doctor_finds_conflicting_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_distribution(tmp_path, "kvcached", "0.1.6")
    make_distribution(tmp_path, "vllm-kvcached", "0.0.7")
    make_distribution(tmp_path, "kvctl", "0.0.8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {(finding.status, finding.text.split(":")[0]) for finding in machine_checks.check_packages()}
    assert ("warning", "the package kvcached 0.1.6 is another project") in found
    assert any(
        status == "error" and text.startswith("kvcached's packages have different versions")
        for status, text in found
    )


def test_the_doctor_reads_the_driver_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "cuda" / "bindings"
    package.mkdir(parents=True)
    (tmp_path / "cupy.py").touch()
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "driver.py").write_text(
        "class CUdevice_attribute:\n    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102\n"
        "def cuInit(flags): return (0,)\ndef cuDeviceGetCount(): return (0, 2)\n"
        "def cuDeviceGet(i): return (0, i)\n"
        "def cuDeviceGetName(n, d): return (0, b'H100\\0\\0')\ndef cuDriverGetVersion(): return (0, 12090)\n"
        "def cuDeviceGetAttribute(a, d): return (0, int(a == 102 and d == 0))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [(finding.status, finding.text.split(":")[0]) for finding in machine_checks.check_cuda()] == [
        ("ok", "the driver supports CUDA 12.9"),
        ("ok", "device 0, H100, supports virtual memory management"),
        ("error", "device 1, H100, has no virtual memory management"),
    ]
    (package / "driver.py").write_text("raise SystemExit('CUDA_ERROR_NO_DEVICE')\n")
    (finding,) = machine_checks.check_cuda()
    assert finding.status == "warning" and finding.text.endswith("CUDA_ERROR_NO_DEVICE")


def test_the_doctor_finds_mps_and_mig(tmp_path: Path) -> None:
    environ = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    (finding,) = machine_checks.check_mps(environ)
    assert finding.status == "warning" and finding.text.endswith("MPS is not running")
    (tmp_path / "control").touch()
    (finding,) = machine_checks.check_mps(environ)
    assert finding.status == "info" and f"MPS runs (control pipe in {tmp_path})" in finding.text
    answer = {"driver": 12090, "devices": [{"name": "NVIDIA H100 MIG 1g.10gb", "vmm": True}]}
    texts = [finding.text for finding in machine_checks._check_devices(json.dumps(answer))]
    assert texts[-1] == "device 0 is a MIG instance, which has its own ledger"


def test_the_doctor_reads_the_limits_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "sys" / "vm").mkdir(parents=True)
    (tmp_path / "sys" / "vm" / "max_map_count").write_text("1000\n")
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:  1024 kB\n")
    (tmp_path / "memory.max").write_text("1048576\n")
    found = [(finding.status, finding.text) for finding in machine_checks.check_host(tmp_path, tmp_path)]
    assert found[:4] == [
        ("warning", "a process may have 1000 memory mappings (vm.max_map_count)"),
        ("info", "MemTotal: 2 MiB"),
        ("info", "MemAvailable: 1 MiB"),
        ("info", "memory limit of this cgroup: 1 MiB"),
    ]
    (tmp_path / "memory.max").write_text("max\n")
    assert not any("cgroup" in finding.text for finding in machine_checks.check_host(tmp_path, tmp_path))
