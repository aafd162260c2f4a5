"""SGLang servers under test, on the CPU with the stand-ins of devkit/sglang_rig."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from devkit.process_groups import members
from devkit.servers import BIN, MODEL_NAME, HttpServer, free_port

# SGLang's own checks: no leaked memory, both while requests run and while none does; a right owner for each
# page; equal decisions of all ranks. A failed check ends the server.
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
}
ENVIRONMENT = STRICT | {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",  # by default SGLang waits a minute after a rank died
    "PYTHONWARNINGS": "ignore",
    # On shared cores two threads wait for each other thirty times longer than they compute.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
STOCK = {"SGLANG_PLUGINS": "none-of-them"}  # no plugin has this name, so none is loaded
_FIXED = [
    "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--random-seed", "1",
    "--host", "127.0.0.1", "--served-model-name", MODEL_NAME, "--skip-server-warmup",
]  # fmt: skip
_SCHEDULER = "sglang::scheduler"


class SglangServer(HttpServer):
    """A server of one model; `command` starts it."""

    path = "/model_info"

    def __init__(
        self,
        name: str,
        model: Path,
        runtime: Path,
        flags: list[str],
        extra: Mapping[str, str],
        command: tuple[str, ...] = (sys.executable, "-m", "sglang.launch_server"),
    ) -> None:
        port = free_port()
        where = ["--model-path", str(model), "--port", str(port)]
        super().__init__(name, runtime, port, [*command, *where, *_FIXED, *flags], {**ENVIRONMENT, **extra})

    def schedulers(self) -> list[int]:
        """Return the process ids of the schedulers, by rank."""
        titles = members(self.process.pid)
        return sorted((pid for pid, title in titles.items() if _SCHEDULER in title), key=titles.__getitem__)


SERVE = (str(BIN / "sglang"), "serve")
