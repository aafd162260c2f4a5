"""The engine under test: `vllm serve` with the elastic backend, on this machine's memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx

BIN = Path(sys.executable).parent
NAME = "demo"
MODEL_NAME = "SmolLM2-135M"
LIMIT, HOST_CAPACITY, SPARE = "512MiB", "4GiB", "16MiB"
READY_SECONDS = 240
_POLL_SECONDS = 0.25


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


class Place(NamedTuple):
    """Where a server listens and keeps its files."""

    port: int
    scratch: Path  # removed at the end, with sockets and the ledger's directory in it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runtime(self) -> Path:
        return self.scratch / "runtime"


def free_port() -> int:
    """Return a port that is free on 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def command(model: Path, place: Place) -> list[str | Path]:
    """Return the command line that serves the model."""
    return [
        BIN / "vllm", "serve", model,
        "--kv-cache-backend", "kvcached",
        "--served-model-name", MODEL_NAME,
        "--dtype", "bfloat16",
        "--max-model-len", "2048",
        "--enforce-eager",
        "--host", "127.0.0.1",
        "--port", str(place.port),
    ]  # fmt: skip


def environment(place: Place, cache: Path) -> dict[str, str]:
    """Return the environment of the server and of tools that look at it; `cache` is kept between runs."""
    return os.environ | {
        "KVCACHED_RUNTIME_DIR": str(place.runtime),
        "KVCACHED_NAME": NAME,
        "KVCACHED_LIMIT": LIMIT,
        "KVCACHED_HOST_CAPACITY": HOST_CAPACITY,
        "KVCACHED_SPARE": SPARE,
        "TMPDIR": str(place.scratch),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
    }


def wait_until_ready(process: subprocess.Popen[bytes], url: str, tell: Callable[[str], None]) -> float:
    """Wait for the server to answer; returns the seconds it took. Raises DemoError if it ends or is late."""
    begun = told = time.monotonic()
    with httpx.Client(timeout=2.0) as client:
        while (now := time.monotonic()) - begun < READY_SECONDS:
            if process.poll() is not None:
                raise DemoError(f"the server ended with status {process.returncode} before it was ready")
            try:
                if client.get(f"{url}/health").is_success:
                    return now - begun
            except httpx.TransportError:
                pass
            if now - told >= 10:
                told = now
                tell(f"waiting for the server, {now - begun:.0f} s")
            time.sleep(_POLL_SECONDS)
    raise DemoError(f"the server was not ready within {READY_SECONDS} s")
