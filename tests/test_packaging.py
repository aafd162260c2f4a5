"""The distributions as a user installs them: pure wheels with one version and no missing dependency."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

import kvcached_core
from tools.wheels import DISTRIBUTIONS, ROOT, build

HEAVY = ("torch", "vllm", "sglang", "cupy", "cuda", "numpy")
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


def project(name: str) -> dict[str, Any]:
    """Return the project table of a distribution's pyproject.toml."""
    text = (ROOT / DISTRIBUTIONS[name][0] / "pyproject.toml").read_text()
    table: dict[str, Any] = tomllib.loads(text)["project"]
    return table


def run(*command: str | Path) -> str:
    """Run a command outside the source tree and return its output; a failure shows the output."""
    done = subprocess.run(
        [str(word) for word in command], cwd="/", env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def closure(*names: str) -> set[str]:
    """Return these distributions and all installed distributions that they require without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            requires = [r for r in distribution(name).requires or [] if "extra ==" not in r and ";" not in r]
            waiting += [re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in requires]
    return found


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def venv(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment that has only both plugins and their requirements, made without a network."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = next(folder.glob("lib/python*/site-packages"))
    # textual requires linkify-it-py through an extra of another package, and closure() leaves extras out
    for name in closure("pluggy", "prompt_toolkit", "textual", "linkify-it-py", "prometheus-client"):
        for file in distribution(name).files or []:
            source = Path(str(file.locate()))
            if source.is_file() and ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, site / file)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    dist = next(iter(wheels.values())).parent
    run(*pip, "install", "--quiet", "--no-index", "--find-links", dist, "vllm-kvcached", "sglang-kvcached")
    run(*pip, "check")
    yield folder


def test_versions_are_in_lockstep() -> None:
    versions = {name: project(name)["version"] for name in DISTRIBUTIONS}
    assert set(versions.values()) == {kvcached_core.__version__}, versions
    for name in DISTRIBUTIONS:
        table = project(name)
        extras = [r for group in table.get("optional-dependencies", {}).values() for r in group]
        ours = [r for r in [*table["dependencies"], *extras] if re.match(r"kvcached|kvctl|vllm|sglang", r)]
        assert all(r.endswith(f"=={kvcached_core.__version__}") for r in ours), ours
    assert f"## {kvcached_core.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_engine_is_no_dependency() -> None:
    for name in DISTRIBUTIONS:
        for requirement in project(name)["dependencies"]:
            assert not re.match(r"(vllm|sglang|torch|cupy|cuda)\b(?!-kvcached)", requirement), (
                name,
                requirement,
            )


def test_extras_name_one_cuda_major_each() -> None:
    for name in ("kvcached-core", "vllm-kvcached", "sglang-kvcached"):
        assert set(project(name)["optional-dependencies"]) == {"cuda12", "cuda13"}
    extras = project("kvcached-core")["optional-dependencies"]
    for major in ("12", "13"):
        assert any(r.startswith(f"cupy-cuda{major}x") for r in extras[f"cuda{major}"])
        assert any(
            r.startswith("cuda-bindings") and f"<{int(major) + 1}" in r for r in extras[f"cuda{major}"]
        )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_wheel_is_pure_and_holds_its_package_only(wheels: dict[str, Path], name: str) -> None:
    wheel = wheels[name]
    package = DISTRIBUTIONS[name][1]
    assert wheel.name == f"{name.replace('-', '_')}-{kvcached_core.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
        (metadata,) = (n for n in members if n.endswith(".dist-info/METADATA"))
        headers = Parser().parsestr(archive.read(metadata).decode())
    code = {n for n in members if ".dist-info/" not in n}
    here = {str(p.relative_to((ROOT / package).parent)) for p in (ROOT / package).rglob("*.py")}
    assert code == {*here, f"{package.name}/py.typed"}
    assert any(n.endswith("LICENSE") for n in members)
    assert headers["Version"] == kvcached_core.__version__
    assert headers["Requires-Python"] == ">=3.11"
    assert headers["License-Expression"] == "Apache-2.0"


def test_installed_wheels_import_and_report_their_version(venv: Path) -> None:
    imports = "import kvcached_core, kvctl, vllm_kvcached, sglang_kvcached"
    code = f"{imports}; print(kvcached_core.__version__, kvcached_core.__file__)"
    version, where = run(venv / "bin" / "python", "-I", "-c", code).split()
    assert version == kvcached_core.__version__
    assert Path(where).is_relative_to(venv)


def test_installed_kvctl_runs_without_torch_or_an_engine(venv: Path) -> None:
    printed = run(venv / "bin" / "kvctl", "--help")
    assert all(command in printed for command in ("list", "limit", "limit-percent", "doctor"))


def test_installed_entry_point_registers_quietly_without_the_engine(venv: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='vllm.general_plugins', name='kvcached')\n"
        "register = point.load()\n"
        "register(); register()\n"
        "print(point.value)\n"
    )
    assert run(venv / "bin" / "python", "-I", "-c", code).strip() == "vllm_kvcached:register"


@pytest.mark.parametrize("package", ["kvcached_core", "kvctl"])
def test_no_module_but_the_cuda_driver_imports_anything_heavy(package: str) -> None:
    code = (
        f"import importlib, pkgutil, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'cli')!r}]\n"
        f"import {package} as package\n"
        f"names = [m.name for m in pkgutil.walk_packages(package.__path__, '{package}.')]\n"
        f"for name in names:\n"
        f"    if name != 'kvcached_core.driver.cuda' and not name.endswith('__main__'):\n"
        f"        importlib.import_module(name)\n"
        f"print(len(names), *[m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    count, *heavy = run(sys.executable, "-c", code).split()
    assert int(count) >= 1
    assert heavy == []
