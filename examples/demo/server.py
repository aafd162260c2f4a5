"""The engines of the demo: two servers with the elastic backend, on one budget of host memory."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from examples.demo.process import Command

BIN = Path(sys.executable).parent
SGLANG_BIN = Path(__file__).resolve().parents[2] / ".venv-sglang" / "bin"  # made by `make setup-sglang`
KINDS = {"vllm": "vLLM", "sglang": "SGLang"}
NAMES = ("smollm2-a", "smollm2-b")  # names of the served models, and so of the engines in the ledger
# Memory budget, spare memory, and the lowered limit, which still has room for one long request.
SIZES = {"bfloat16": ("144MiB", "16MiB", "56MiB"), "float32": ("288MiB", "32MiB", "112MiB")}
# A processor without bfloat16 instructions computes six times slower in bfloat16.
_HALF = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
DTYPE = "bfloat16" if _HALF else "float32"
BUDGET, SPARE, LOWERED = SIZES[DTYPE]
READY_SECONDS = 300
_POLL_SECONDS = 0.25


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Engine(NamedTuple):
    """One server: its model's name, its port, the cores that it computes on, and the kind of engine."""

    name: str
    port: int
    cores: str
    kind: str = "vllm"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the two kinds of engine that ENGINES=`text` names; empty: vllm twice. Raises DemoError."""
    kinds = tuple(word.strip() for word in (text or "vllm,vllm").split(","))
    if len(kinds) != len(NAMES) or not set(kinds) <= set(KINDS):
        raise DemoError(f"ENGINES={text!r}: expected two of {', '.join(KINDS)}, with a comma between them")
    return kinds


def title(engines: Sequence[Engine]) -> str:
    """Return a title that names the engines."""
    first, *others = dict.fromkeys(KINDS[engine.kind] for engine in engines)
    return f"{first} and {others[0]}, one server each," if others else f"Two {first} servers"


def make_engines(kinds: Sequence[str]) -> tuple[Engine, ...]:
    """Return the engines to start: on ports that are free now, with equal shares of the cores."""
    there = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in NAMES]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in sockets]
    shares = [there[at :: len(NAMES)] or there for at in range(len(NAMES))]
    return tuple(
        Engine(name, port, ",".join(map(str, cores)), kind)
        for name, port, cores, kind in zip(NAMES, ports, shares, kinds, strict=True)
    )


def command(model: Path, engine: Engine) -> list[str | Path]:
    """Return the command line that serves the model."""
    if engine.kind == "sglang":
        own: list[str | Path] = [
            SGLANG_BIN / "python", "-m", "sglang.launch_server", "--model-path", model,
            "--context-length", "2048", "--page-size", "128",
            "--device", "cpu", "--attention-backend", "torch_native", "--skip-server-warmup",
        ]  # fmt: skip
    else:
        own = [BIN / "vllm", "serve", model, "--max-model-len", "2048", "--enforce-eager"]
    return [
        *own, "--kv-cache-backend", "kvcached", "--served-model-name", engine.name, "--dtype", DTYPE,
        "--host", "127.0.0.1", "--port", str(engine.port),
    ]  # fmt: skip


def threads(engine: Engine) -> dict[str, str]:
    """Return the variables that keep an engine on its cores."""
    if engine.kind == "sglang":
        count = str(engine.cores.count(",") + 1)  # with more threads than cores, threads wait for each other
        return {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    return {"VLLM_CPU_OMP_THREADS_BIND": engine.cores}


def environment(scratch: Path, cache: Path) -> dict[str, str]:
    """Return the environment of both servers and of kvctl.

    `scratch` is removed at the end, with sockets and the ledgers in it; `cache` is kept between runs.
    """
    return os.environ | {
        "KVCACHED_RUNTIME_DIR": str(runtime(scratch)),
        "KVCACHED_HOST_CAPACITY": BUDGET,
        "KVCACHED_HEADROOM": "0",
        "KVCACHED_SPARE": SPARE,
        "TMPDIR": str(scratch),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
    }


def commands(
    model: Path, engines: Sequence[Engine], environ: Mapping[str, str], logs: Mapping[Engine, Path]
) -> list[Command]:
    """Return the commands that start the servers, each with its name and on its cores."""
    return [
        Command(
            command(model, engine),
            dict(environ) | threads(engine) | {"KVCACHED_NAME": engine.name},
            logs[engine],
        )
        for engine in engines
    ]


def runtime(scratch: Path) -> Path:
    """Return the runtime directory, which holds the ledgers."""
    return scratch / "runtime"


def wait_until_ready(servers: Mapping[Engine, subprocess.Popen[bytes]], tell: Callable[[str], None]) -> None:
    """Wait until all servers answer; raises DemoError if a server ends or is not ready in time."""
    begun = told = time.monotonic()
    waiting = dict(servers)
    with httpx.Client(timeout=2.0) as client:
        while waiting:
            now = time.monotonic()
            if now - begun > READY_SECONDS:
                late = ", ".join(engine.name for engine in waiting)
                raise DemoError(f"{late}: not ready within {READY_SECONDS} s")
            for engine, process in list(waiting.items()):
                if process.poll() is not None:
                    raise DemoError(
                        f"{engine.name} ended with status {process.returncode} before it was ready"
                    )
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{engine.url}/health").is_success:
                        del waiting[engine]
                        tell(f"{engine.name} is ready after {now - begun:.0f} s")
            if now - told >= 10:
                told = now
                tell(f"waiting for {', '.join(engine.name for engine in waiting)}, {now - begun:.0f} s")
            time.sleep(_POLL_SECONDS)
