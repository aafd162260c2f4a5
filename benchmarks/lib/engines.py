"""Engines as child processes. They start at once and answer at the same time; every wait has a time limit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib import vllm_engine
from devkit.process_groups import kill_group
from kvcached_core.driver import nvml
from kvcached_core.ledger import OwnerSnapshot, Runtime, snapshot
from kvcached_core.units import GIB, MIB

KILL_SECONDS = 30.0
FILL_UNITS = 8
CHILDREN = {"vllm": "vllm_child", "sglang": "sglang_child"}
_LOOK_SECONDS = 0.2  # interval at which a wait checks that the process is alive


@dataclass(frozen=True)
class Scale:
    """The sizes of a benchmark. Scenes count memory in units of `gib` bytes, which is a GiB on a GPU."""

    driver: str
    gib: int
    model: Path
    vocabulary: int
    prompt: int  # tokens of a usual prompt
    generate: int
    private_bytes: int  # an engine's memory outside its KV cache, roughly
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments of the engine
    options: dict[str, str] = field(default_factory=dict)  # settings of kvcached

    @property
    def on_host(self) -> bool:
        return self.driver == "host"


def scale(host: bool, model: Path | None, engine: str = "vllm") -> Scale:
    """Return the sizes for a GPU, or for the host: a tiny model, and 8 MiB where a GPU would have a GiB.

    Raises SystemExit if no model is given for the host.
    """
    if not host:
        path = vllm_engine.model_folder(model or Path("build/bench/llama-8b"))
        return Scale("cuda", GIB, path, 100_000, 1024, 128, private_bytes=37 * GIB // 2)
    if model is None or not (model / "config.json").exists():
        raise SystemExit(
            "on the host a small model is needed: --model FOLDER (python -m devkit.models tiny FOLDER)"
        )
    arguments = {"enforce_eager": True, "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 64,
                 "compilation_config": {"mode": 0}}  # fmt: skip
    return Scale(
        "host", 8 * MIB, model, 500, 900, 124, private_bytes=0,
        arguments=arguments if engine == "vllm" else {"context_length": 2048},
        options={"spare": "4MiB", "idle_seconds": "0.5"},
    )  # fmt: skip


def has_gpu() -> bool:
    """Say whether the system has an NVIDIA GPU."""
    return Path("/dev/nvidiactl").exists()


class EngineDiedError(RuntimeError):
    """A child process ended, or was killed, before its answer."""


class Engine:
    """An engine in a child process, which starts at once; wait_ready() waits until the engine serves."""

    def __init__(self, name: str, scale: Scale, logs: Path, options: Mapping[str, str] | None = None,
                 core: int | None = None, ranks: int = 1, backend: str = "kvcached", engine: str = "vllm",
                 environ: Mapping[str, str] | None = None) -> None:  # fmt: skip
        """Start the process.

        `options` are kvcached settings. `core` is the CPU of the first rank if the engine runs on the CPU.
        `environ` is added to this process's environment.
        """
        self.name = name
        self.log = logs / f"{name}.log"
        self.started = time.monotonic()
        self.info: dict[str, Any] = {}
        self.start_seconds = 0.0
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {0: Future()}
        self._ready = self._waiting[0]
        self._lock = threading.Lock()
        command = [
            sys.executable, "-m", f"benchmarks.lib.{CHILDREN[engine]}", "--model", str(scale.model),
            "--vocabulary", str(scale.vocabulary), "--backend", backend, "--ranks", str(ranks),
            "--options", json.dumps({**scale.options, **(options or {}), "name": name}),
            "--arguments", json.dumps(scale.arguments),
        ]  # fmt: skip
        environ = {**os.environ, **(_places(core, ranks) if scale.on_host else {}), **(environ or {})}
        self._process, answers = self._spawn(command, environ, logs)
        threading.Thread(target=self._read, args=(answers,), name=f"read-{name}", daemon=True).start()

    def _spawn(self, command: list[str], environ: dict[str, str], logs: Path) -> tuple[Any, int]:
        ours, theirs = os.pipe()
        command = [*command, "--answers", str(theirs)]
        logs.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                                       pass_fds=(theirs,), start_new_session=True, env=environ)  # fmt: skip
        os.close(theirs)
        return process, ours

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status as in subprocess; None while the process is alive."""
        status: int | None = self._process.poll()
        return status

    @property
    def group(self) -> int:
        """The process group of the engine."""
        return int(self._process.pid)

    def wait_ready(self, seconds: float) -> float:
        """Return the seconds from the start until the engine served. Raises EngineDiedError, TimeoutError."""
        self.info = self.result(self._ready, seconds)
        self.start_seconds = self.info["at"] - self.started
        return self.start_seconds

    def ask(self, do: str, **what: Any) -> Future[dict[str, Any]]:
        """Send a command; return the future of its answer."""
        asked: Future[dict[str, Any]] = Future()
        with self._lock:
            number = next(self._ids)
            self._waiting[number] = asked
            try:
                self._process.stdin.write(json.dumps({"id": number, "do": do, **what}) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError):
                asked.set_exception(self._death())
        return asked

    def burst(self, count: int, length: int, generate: int, seed: int, salt: str = "",
              keeps: bool = False) -> Future[dict[str, Any]]:  # fmt: skip
        """Send random prompts. The answer has `tokens`, `failed` and, with `keeps`, the `outputs`."""
        return self.ask(
            "burst", count=count, length=length, generate=generate, seed=seed, salt=salt, keeps=keeps
        )

    def requests_in(self, size_bytes: int, tokens: int, owner: OwnerSnapshot) -> int:
        """Return how many requests of `tokens` tokens need about `size_bytes` of the owner's KV cache."""
        blocks = math.ceil(tokens / int(self.info["block_tokens"]))
        return max(1, round(size_bytes / (blocks * block_bytes(owner))))

    def tokens_in(self, size_bytes: int, owner: OwnerSnapshot) -> int:
        """Return how many tokens of one request fit into `size_bytes` of KV cache."""
        return size_bytes // block_bytes(owner) * int(self.info["block_tokens"])

    def result(self, asked: Future[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Wait up to `seconds` for an answer. Raises EngineDiedError, TimeoutError."""
        give_up_at = time.monotonic() + seconds
        while True:
            with contextlib.suppress(TimeoutError):
                return asked.result(timeout=max(0.0, min(_LOOK_SECONDS, give_up_at - time.monotonic())))
            if not self.alive and not asked.done():
                raise self._death()
            if time.monotonic() >= give_up_at:
                raise TimeoutError(f"engine {self.name} has not answered within {seconds:.0f} s")

    def send_kill(self) -> None:
        """Send SIGKILL to the engine's process group; the processes end a moment later."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the engine's process group and remove its shared memory; may be called again."""
        kill_group(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)

    def _read(self, answers: int) -> None:
        with os.fdopen(answers) as lines:
            for line in lines:
                answer = json.loads(line)
                self._waiting.pop(answer["id"]).set_result(answer | {"at": time.monotonic()})

    def _death(self) -> EngineDiedError:
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line[-300:] for line in lines if "Error: " in line][-2:] or lines[-2:]
        status = self._process.poll()
        return EngineDiedError(f"engine {self.name} ended with status {status}: {' | '.join(told)}")


def _places(core: int | None, ranks: int) -> dict[str, str]:
    """Return the environment that binds each rank of an engine on the CPU to a core, while cores last."""
    places = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if core is not None:
        cores = sorted(os.sched_getaffinity(0))
        bound = "|".join(str(cores[(core + rank) % len(cores)]) for rank in range(ranks))
        places |= {"VLLM_CPU_OMP_THREADS_BIND": bound, "SGLANG_CPU_OMP_THREADS_BIND": bound}
    return places


def owner_of(name: str, runtime: Runtime) -> OwnerSnapshot:
    """Return the ledger's entry of an engine of one rank. Raises StopIteration if there is none."""
    owners = (owner for device in snapshot(runtime) for owner in device.owners if owner.live)
    return next(owner for owner in owners if owner.name == name)


def free_of(runtime: Runtime, on_host: bool) -> Callable[[], int]:
    """Return a function for the device's free bytes: the driver's figure, or on the host the ledger's."""

    def free_bytes() -> int:
        (device,) = snapshot(runtime)
        if on_host:
            return device.capacity_bytes - device.leased_bytes
        return nvml.memory_of(device.uuid).free_bytes

    return free_bytes


def block_bytes(owner: OwnerSnapshot) -> int:
    """Return the bytes of a block, summed over all segments."""
    return owner.stride_bytes * (owner.granule_bytes // owner.page_bytes)


def content_bytes(owner: OwnerSnapshot) -> int:
    """Return the bytes of used and cached blocks."""
    return owner.used_bytes + owner.cached_bytes


def fill(engine: Engine, owner: Callable[[], OwnerSnapshot], scale: Scale, seeds: Iterator[int],
         seconds: float) -> int:  # fmt: skip
    """Send new prompts until the cache is full and evicts; return the bytes of used and cached blocks.

    Raises TimeoutError, EngineDiedError.
    """
    give_up_at, length = time.monotonic() + seconds, engine.info["max_model_len"] // 2
    after = owner()
    while (left := give_up_at - time.monotonic()) > 0:
        before = after
        count = engine.requests_in(FILL_UNITS * scale.gib, length, before)
        engine.result(engine.burst(count, length, 1, next(seeds)), left)
        after = owner()
        if content_bytes(after) - content_bytes(before) < scale.gib / 2:
            return content_bytes(after)
    raise TimeoutError(f"the cache of {engine.name} still grows after {seconds:.0f} s")
