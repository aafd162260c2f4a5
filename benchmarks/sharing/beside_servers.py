"""The servers of benchmarks.sharing.beside: `vllm serve` and `sglang.launch_server`, each with its Python."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.lib import sglang_engine, vllm_engine
from devkit.client import Client, Prompt
from devkit.models import tiny_model
from devkit.servers import MODEL_NAME, PACKAGES, ROOT, HttpServer, cores, free_port
from devkit.sglang_client import SglangClient
from devkit.sglang_servers import ENVIRONMENT
from kvcached_core.units import MIB

PROBES, PROBE_TOKENS, VOCABULARY = 6, 48, 500  # both models have all token ids below VOCABULARY
DEVIATION = 0.05  # of the random weights: large enough that answers depend on the KV cache
_MAKE = "import sys; from pathlib import Path; from benchmarks.engine.sglang_outputs import checkpoint; "
_MAKE += "checkpoint(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))"
_VERSIONS = "import json; from benchmarks.lib.record import versions; print(json.dumps(versions()))"
_PASSED = "VLLM_USE_FLASHINFER_SAMPLER"  # passed to vLLM; set it to 0 if flashinfer is not installed
_ON_HOST = {"KVCACHED_HOST_CAPACITY": str(216 * MIB), "KVCACHED_HEADROOM": str(16 * MIB),
            "KVCACHED_SPARE": "4MiB", "KVCACHED_IDLE_SECONDS": "0.5"}  # fmt: skip


class Where(NamedTuple):
    """A Python, and optionally a folder of packages that precede the packages of that Python."""

    python: str
    site: Path | None = None

    def path(self) -> str:
        """Return PYTHONPATH: this tree's packages, `site`, and the caller's path (maybe with the plugins)."""
        more = [str(self.site)] if self.site else []
        more += filter(None, [os.environ.get("PYTHONPATH")])
        return os.pathsep.join([*(str(ROOT / part) for part in PACKAGES), *more])

    def versions(self) -> dict[str, str]:
        """Return the versions of this Python and its packages; see record.versions."""
        printed = self.run("-c", _VERSIONS)
        return {str(name): str(version) for name, version in json.loads(printed).items()}

    def run(self, *words: str) -> str:
        """Run this Python; return its standard output. Raises CalledProcessError."""
        environ = os.environ | {"PYTHONPATH": self.path()}
        done = subprocess.run([self.python, *words], check=True, cwd=ROOT, env=environ, text=True,
                              stdout=subprocess.PIPE)  # fmt: skip
        return done.stdout


class Scale(NamedTuple):
    """The served model, and the sizes of requests in tokens."""

    on_host: bool
    model: Path
    token_bytes: int
    prompt: int
    generate: int
    length: int  # the longest request
    at_once: int
    settings: dict[str, str]  # of kvcached, as variables


def scale(on_host: bool, model: Path, maker: Where, headroom: str | None = None) -> Scale:
    """Return the sizes: the tiny model on the host, the shape of Llama-8B on a GPU less `headroom`.

    A checkpoint of this shape (16 GB) is written once, by a child process, so that this process makes no CUDA
    context.
    """
    if on_host:
        return Scale(True, tiny_model(), 4096, 900, 124, 2048, 64, _ON_HOST)
    layers = str(vllm_engine.SHAPE["num_hidden_layers"])
    maker.run("-c", _MAKE, str(model.absolute()), str(DEVIATION), layers)
    settings = {"KVCACHED_HEADROOM": headroom} if headroom else {}
    return Scale(False, model.absolute(), sglang_engine.BYTES_PER_TOKEN, 1024, 128, 4096, 256, settings)


def start_vllm(scale: Scale, where: Where, runtime: Path) -> HttpServer:
    """Start a vLLM server without waiting until it serves."""
    port = free_port()
    words = [where.python, "-m", "vllm.entrypoints.cli.main", "serve", str(scale.model),
             "--served-model-name", MODEL_NAME, "--max-model-len", str(scale.length), "--skip-tokenizer-init",
             "--max-num-seqs", str(scale.at_once)]  # fmt: skip
    if scale.on_host:
        words += ["--dtype", "float32", "--enforce-eager"]
    else:
        words += ["--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']
    return _start("vllm", scale, where, runtime, port, words, {"VLLM_CPU_OMP_THREADS_BIND": _core(1)})


def start_sglang(scale: Scale, where: Where, runtime: Path) -> HttpServer:
    """Start an SGLang server without waiting until it serves."""
    port = free_port()
    words = [where.python, "-m", "sglang.launch_server", "--model-path", str(scale.model),
             "--served-model-name", MODEL_NAME, "--context-length", str(scale.length),
             "--skip-tokenizer-init", "--max-running-requests", str(scale.at_once), "--random-seed", "1",
             "--skip-server-warmup"]  # fmt: skip
    if scale.on_host:
        words += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"]
    else:
        words += ["--attention-backend", "triton", "--sampling-backend", "pytorch",
                  "--mem-fraction-static", "0.85"]  # fmt: skip
    server = _start("sglang", scale, where, runtime, port, words, ENVIRONMENT if scale.on_host else {})
    server.path = "/model_info"
    return server


def _start(name: str, scale: Scale, where: Where, runtime: Path, port: int, words: list[str],
           more: dict[str, str]) -> HttpServer:  # fmt: skip
    settings = {"KVCACHED_NAME": name, "PYTHONPATH": where.path()} | scale.settings
    settings |= {key: value for key, value in os.environ.items() if key == _PASSED}
    words += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-backend", "kvcached"]
    return HttpServer(f"beside-{name}", runtime, port, words, settings | more)


def _core(rank: int) -> str:
    return cores(rank + 1).split("|")[rank]


class Served:
    """A server that is ready. Implements Party of benchmarks.sharing.beside."""

    def __init__(self, name: str, server: HttpServer, scale: Scale, seeds: Iterator[int]) -> None:
        self.name = name
        self._server, self._scale, self._seeds = server, scale, seeds
        self._client = SglangClient(server.url) if name == "sglang" else Client(server.url, connections=None)
        self._pool = ThreadPoolExecutor(2 * scale.at_once + 1)

    def burst(self, size_bytes: int) -> Future[int]:
        """See Party."""
        scale = self._scale
        count = max(1, size_bytes // (scale.token_bytes * (scale.prompt + scale.generate)))
        prompts = self._prompts(count, scale.prompt, scale.generate, next(self._seeds))
        return self._pool.submit(lambda: sum(self._pool.map(self._fails, prompts)))

    def answers(self) -> list[tuple[int, ...]]:
        """See Party."""
        self.flush()
        return [self._client.ids(prompt) for prompt in self._prompts(PROBES, 200, PROBE_TOKENS, 10_000)]

    def flush(self) -> None:
        """Drop the prefix cache. Raises RuntimeError if requests still run."""
        for _ in itertools.repeat(None, 1000):  # no sleep: each refusal takes a round trip to the server
            if self._client.reset_prefix_cache():
                return
        raise RuntimeError(f"{self.name} does not flush its prefix cache: requests run on it")

    def kill(self) -> None:
        """See Party."""
        os.killpg(self._server.process.pid, signal.SIGKILL)

    def _fails(self, prompt: Prompt) -> bool:
        try:
            return len(self._client.ids(prompt)) != prompt.max_tokens
        except (httpx.HTTPError, KeyError, ValueError):
            return True

    @staticmethod
    def _prompts(count: int, length: int, generate: int, seed: int) -> list[Prompt]:
        drawn: list[dict[str, Any]] = vllm_engine.prompts(count, length, seed, VOCABULARY)
        return [Prompt(tuple(one["prompt_token_ids"]), generate) for one in drawn]
