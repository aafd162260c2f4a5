"""The start scripts, and what is in docker/ and examples/, without an engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcached_core.ledger import Runtime
from tools.wheels import DISTRIBUTIONS, ROOT

SCRIPTS = ("start_server.sh", "start_client.sh")
SHELL = [*sorted((ROOT / "benchmarks").glob("*.sh")), *sorted((ROOT / "docker").glob("*.sh"))]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script."""
    return subprocess.run(
        [ROOT / "benchmarks" / script, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for option in ("--model", "--name", "--port", "--print", "vllm|sglang"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("start_server.sh", "--model /m/qwen --device cpu --port 81",
         "serve /m/qwen --served-model-name qwen --kv-cache-backend kvcached --host 127.0.0.1 --port 81 "
         "--enforce-eager --max-model-len 2048"),
        ("start_server.sh", "vllm --model /m/qwen --device cuda -- --seed 1",
         "serve /m/qwen --served-model-name qwen --kv-cache-backend kvcached --host 127.0.0.1 --port 8000 "
         "--seed 1"),
        ("start_server.sh", "sglang --model /m/qwen --name q --device cpu",
         "-m sglang.launch_server --model-path /m/qwen --served-model-name q --device cpu --host 127.0.0.1 "
         "--port 8000"),
        ("start_client.sh", "--model /m/qwen --rate inf --prompts 3 --input 5 --output 6",
         "bench serve --backend openai --base-url http://127.0.0.1:8000 --model qwen --tokenizer /m/qwen "
         "--dataset-name random --random-input-len 5 --random-output-len 6 --num-prompts 3 "
         "--request-rate inf"),
        ("start_client.sh", "sglang --model /m/qwen --port 9",
         "-m sglang.bench_serving --backend sglang --host 127.0.0.1 --port 9 --model /m/qwen --dataset-name "
         "random-ids --random-range-ratio 1 --random-input-len 256 --random-output-len 64 --num-prompts 100 "
         "--request-rate 4"),
    ],
)  # fmt: skip
def test_what_would_be_run(script: str, arguments: str, expected: str) -> None:
    before, *after = f"{arguments} ".split(" -- ")
    done = run(script, *before.split(), "--print", *(["--", *after[0].split()] if after else []))
    assert done.returncode == 0 and " ".join(shlex.split(done.stdout)).endswith(expected), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vlm", "no engine is named 'vlm'"), ("--model", "--model: a value is missing"),
        ("--port x --print", "--port: expected a number"), ("--port 0 --print", "--port: expected a number"),
        ("--rate fast --print", "--rate: expected a number or inf"), ("--what", "what is '--what'?"),
        ("--model /nowhere", "/nowhere is no folder"), ("--device tpu", "expected cuda or cpu"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_2_and_says_why(arguments: str, message: str) -> None:
    for script in SCRIPTS:
        done = run(script, *arguments.split())
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", *SHELL], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "") and len(SHELL) == 4


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
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    assert command.startswith("pip install ") and "&& rm -r /tmp/wheels" in command
    names = {*DISTRIBUTIONS, "sglang-kvcached"}
    assert any(name in command for name in names) and "--find-links /tmp/wheels" in command
    (entry,) = (rest for word, rest in found if word == "ENTRYPOINT")
    assert isinstance(json.loads(entry), list)


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


def test_pods_on_a_node_share_the_directory() -> None:
    found = documents("examples/kubernetes/kvcached.yaml")
    assert [each["kind"] for each in found] == ["Namespace", "Deployment", "Deployment", "DaemonSet"]
    for each in found[1:]:
        pod = each["spec"]["template"]["spec"]
        assert each["spec"]["selector"]["matchLabels"] == each["spec"]["template"]["metadata"]["labels"]
        (volume,) = pod["volumes"]
        assert volume["hostPath"] == {"path": "/run/kvcached", "type": "DirectoryOrCreate"}
        assert pod["securityContext"]["runAsGroup"] == 1000
        for container in pod["containers"]:
            assert container["volumeMounts"] == [{"name": "kvcached", "mountPath": "/run/kvcached"}]
            assert {"name": "KVCACHED_RUNTIME_DIR", "value": "/run/kvcached"} in container["env"]
