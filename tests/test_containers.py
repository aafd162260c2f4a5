"""Lint the files of docker/ and examples/, and run their shell commands that need no container."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devkit.report import record
from kvcached_core.ledger import Runtime
from kvctl.parser import parse
from tests.programs import program
from tools.wheels import DISTRIBUTIONS, ROOT, build

SHELL = [
    *(
        path
        for folder in ("benchmarks/serve", "docker", "tools")
        for path in sorted((ROOT / folder).glob("*.sh"))
    ),
    ROOT / ".ci/run",
]


def lint(tool: str, *arguments: str | Path) -> None:
    """Run a linter in the root of the tree; fails with the linter's output."""
    done = subprocess.run([program(tool), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stdout + done.stderr
    record("lint.runs", 1)


@pytest.mark.parametrize("path", SHELL, ids=[path.name for path in SHELL])
def test_shellcheck_finds_nothing(path: Path) -> None:
    lint("shellcheck", "-x", path)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "kvctl"])
def test_hadolint_finds_nothing_in_a_dockerfile(engine: str) -> None:
    # DL3013 asks for pinned versions. Our packages are local wheels (--find-links), so none is pinned.
    lint("hadolint", "--ignore", "DL3013", f"docker/{engine}.Dockerfile")


def test_yamllint_finds_nothing_in_compose_files_pods_and_rules() -> None:
    found = [path for folder in ("docker", "examples") for path in (ROOT / folder).rglob("*.y*ml")]
    rules = "{extends: default, rules: {document-start: disable, line-length: {max: 200}}}"
    assert len(found) >= 8
    lint("yamllint", "--strict", "--config-data", rules, *found)


def test_the_shared_runtime_directory_is_one_that_engines_accept(tmp_path: Path) -> None:
    folder, group = tmp_path / "kvcached", str(os.getgid())
    done = subprocess.run([ROOT / "docker/prepare.sh", folder, group], capture_output=True, text=True)
    assert done.returncode == 0 and f"is ready for group {group}" in done.stdout
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770
    assert Runtime.open(folder).shared
    wrong = subprocess.run([ROOT / "docker/prepare.sh", folder, "docker"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "the group is a number" in wrong.stderr


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Return the instructions of a Dockerfile, lines joined, comments left out."""
    text = re.sub(r"\\\n", " ", "\n".join(x for x in path.read_text().splitlines() if not x.startswith("#")))
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        yield word, " ".join(rest.split())


@pytest.mark.parametrize("engine", ["vllm", "sglang", "kvctl"])
def test_a_dockerfile_only_installs_our_wheels_on_an_official_image(engine: str) -> None:
    found = list(instructions(ROOT / "docker" / f"{engine}.Dockerfile"))
    words = [word for word, _ in found]
    assert set(words) <= {"ARG", "FROM", "COPY", "RUN", "ENV", "ENTRYPOINT"} and words.count("FROM") == 1
    official = {"vllm": "vllm/vllm-openai:", "sglang": "lmsysorg/sglang:", "kvctl": "python:"}[engine]
    (image,) = (rest for word, rest in found if word == "FROM")
    assert image.startswith(official) and "latest" not in image
    (command,) = (rest for word, rest in found if word == "RUN")
    assert command.startswith("pip install ") and "&& rm -r /tmp/wheels" in command
    names = {*DISTRIBUTIONS, "sglang-kvcached"}
    assert any(name in command for name in names) and "--find-links /tmp/wheels" in command
    (entry,) = (rest for word, rest in found if word == "ENTRYPOINT")
    assert isinstance(json.loads(entry), list)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(folder)
    return folder


@pytest.mark.parametrize("engine", ["vllm", "sglang", "kvctl"])
def test_the_install_command_finds_our_wheels_and_removes_them(
    engine: str, wheels: Path, tmp_path: Path
) -> None:
    """Only our wheels are looked for: the image's own packages, which pip would find there, are not here."""
    found = [rest for word, rest in instructions(ROOT / "docker" / f"{engine}.Dockerfile") if word == "RUN"]
    copy, shims = tmp_path / "wheels", tmp_path / "bin"
    copy.mkdir()
    shims.mkdir()
    for wheel in wheels.glob("*.whl"):
        (copy / wheel.name).hardlink_to(wheel)
    options = "--dry-run --no-index --no-deps --ignore-installed --disable-pip-version-check"
    (shims / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@" {options}\n')
    (shims / "pip").chmod(0o755)
    environ = os.environ | {"PATH": f"{shims}{os.pathsep}{os.environ['PATH']}", "CUDA": "cuda13"}
    done = subprocess.run(
        ["sh", "-c", found[0].replace("/tmp/wheels", str(copy))], env=environ, capture_output=True, text=True
    )
    ours = "kvctl" if engine == "kvctl" else f"{engine}-kvcached"
    assert done.returncode == 0 and f"Would install {ours}-" in done.stdout, done.stdout + done.stderr
    assert "does not provide the extra" not in done.stderr and not copy.exists()


def documents(path: str) -> list[Any]:
    """Return the documents of a YAML file."""
    return list(yaml.safe_load_all((ROOT / path).read_text()))


@pytest.mark.parametrize("path", ["docker/compose.yaml", "examples/monitoring/compose.yaml"])
def test_compose_files_share_the_directory_and_open_ports_to_this_machine_only(path: str) -> None:
    (compose,) = documents(path)
    folder = (ROOT / path).parent
    for name, service in compose["services"].items():
        assert ("image" in service) != ("build" in service), name
        if "build" in service:
            assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).exists()
            assert any(":/run/kvcached" in volume for volume in service["volumes"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (folder / source).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_engines_that_run_as_a_user_without_a_name_have_what_that_user_lacks() -> None:
    (compose,) = documents("docker/compose.yaml")
    for name in ("llama", "qwen"):
        environment = compose["services"][name]["environment"]
        assert set(environment) >= {"HOME", "USER", "HF_HOME", "HF_TOKEN", "KVCACHED_RUNTIME_DIR"}, name


def test_kvctl_understands_the_arguments_that_containers_give_it() -> None:
    services = [
        service
        for path in ("docker/compose.yaml", "examples/monitoring/compose.yaml")
        for service in documents(path)[0]["services"].values()
    ]
    calls = [
        s["command"] for s in services if s.get("build", {}).get("dockerfile") == "docker/kvctl.Dockerfile"
    ]
    assert [parse(call).command for call in calls] == ["kvtop", "export"]
