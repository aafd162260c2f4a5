"""benchmarks/serve/start_server.sh and start_client.sh: their options and commands, without an engine."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.wheels import ROOT

SCRIPTS = ("start_server.sh", "start_client.sh")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of benchmarks/serve; return its exit status and output."""
    return subprocess.run(
        [ROOT / "benchmarks" / "serve" / script, *arguments], capture_output=True, text=True, timeout=60
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
         "vllm serve /m/qwen --served-model-name qwen --kv-cache-backend kvcached --host 127.0.0.1 --port 81 "
         "--enforce-eager --max-model-len 2048"),
        ("start_server.sh", "vllm --model /m/qwen --device cuda -- --seed 1",
         "serve /m/qwen --served-model-name qwen --kv-cache-backend kvcached --host 127.0.0.1 --port 8000 "
         "--seed 1"),
        ("start_server.sh", "sglang --model /m/qwen --name q --device cpu",
         "-m sglang.launch_server --model-path /m/qwen --served-model-name q --device cpu --host 127.0.0.1 "
         "--port 8000"),
        ("start_server.sh", "sgl --model Qwen/Qwen3-0.6B --device cuda",
         "-m sglang.launch_server --model-path Qwen/Qwen3-0.6B --served-model-name Qwen3-0.6B "
         "--host 127.0.0.1 --port 8000"),
        ("start_client.sh", "--model /m/qwen --rate inf --prompts 3 --input 5 --output 6",
         "bench serve --backend openai --base-url http://127.0.0.1:8000 --model qwen --tokenizer /m/qwen "
         "--dataset-name random --random-input-len 5 --random-output-len 6 --num-prompts 3 "
         "--request-rate inf"),
        ("start_client.sh", "sglang --model /m/qwen --port 9",
         "-m sglang.bench_serving --backend sglang --host 127.0.0.1 --port 9 --model /m/qwen --dataset-name "
         "random-ids --random-range-ratio 1 --random-input-len 256 --random-output-len 64 --output-file "
         "/dev/null --num-prompts 100 --request-rate 4"),
    ],
)  # fmt: skip
def test_print_shows_the_command(script: str, arguments: str, expected: str) -> None:
    before, *after = f"{arguments} ".split(" -- ")
    done = run(script, *before.split(), "--print", *(["--", *after[0].split()] if after else []))
    assert done.returncode == 0 and " ".join(shlex.split(done.stdout)).endswith(expected), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vlm", "no engine is named 'vlm'"), ("--model", "--model: a value is missing"),
        ("--port x --print", "--port: expected a number"), ("--port 0 --print", "--port: expected a number"),
        ("--rate fast --print", "--rate: expected a number above 0 or inf"),
        ("--rate 0 --print", "above 0 or inf, not '0'"), ("--rate 0.0 --print", "above 0 or inf, not '0.0'"),
        ("--model a/b --venv-path /nowhere", "/nowhere has no bin/python with vllm"),
        ("--port 65536 --print", "--port: expected at most 65535"), ("--what", "unknown option '--what'"),
        ("--model /nowhere", "/nowhere is no folder, and no hub id"),
        ("--model build/no/where", "build/no/where is no folder"), ("--device tpu", "expected cuda or cpu"),
    ],
)  # fmt: skip
def test_a_wrong_call_exits_with_2_and_says_why(arguments: str, message: str) -> None:
    for script in SCRIPTS:
        done = run(script, *arguments.split())
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ("vllm --device cpu", "VLLM_CPU_KVCACHE_SPACE=1 KVCACHED_NAME=qwen"),
        ("vllm --device cuda", "KVCACHED_NAME=qwen"),
        ("sglang --device cpu", "ENABLE_KVCACHED=true KVCACHED_NAME=qwen"),
    ],
)
def test_print_shows_every_variable_that_the_command_gets(arguments: str, variables: str) -> None:
    done = run("start_server.sh", *arguments.split(), "--model", "/m/qwen", "--print")
    words = shlex.split(done.stdout)
    program = next(place for place, word in enumerate(words) if "/" in word)
    assert words[:program] == ["env", *variables.split()], done.stdout + done.stderr


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_interpreter_without_the_engine_is_not_taken(engine: str, tmp_path: Path) -> None:
    """A copy of the scripts has no environment beside it, and the only `python` lacks both engines."""
    serve, bare = tmp_path / "benchmarks/serve", tmp_path / "bin"
    shutil.copytree(ROOT / "benchmarks/serve", serve)
    bare.mkdir()
    (bare / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # -S: no site-packages
    (bare / "python").chmod(0o755)
    for each in ("bash", "dirname", "basename", "env", "cat"):
        (bare / each).symlink_to(str(shutil.which(each)))
    done = subprocess.run(
        [serve / "start_server.sh", engine, "--model", "a/b", "--device", "cpu"],
        env={"PATH": str(bare)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    make = {"vllm": "make setup,", "sglang": "make setup-sglang,"}[engine]
    assert f"{engine} is not installed: run {make} or activate" in done.stderr
