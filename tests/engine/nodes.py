"""One engine on two simulated nodes of this machine, each with its own runtime directory and CPU core."""

from __future__ import annotations

from pathlib import Path

from devkit.servers import BIN, MODEL_NAME, Child, Server, cores, free_port

ON_LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


class TwoNodes(Server):
    """`vllm serve` on node 0, and a headless follower; their runtime directories are in `place`."""

    def __init__(self, name: str, model: Path, place: Path, flags: list[str], extra: dict[str, str]) -> None:
        self.runtimes = [place / "node-0", place / "node-1"]
        for runtime in self.runtimes:
            runtime.mkdir(mode=0o700)
        bound = cores(2).split("|")
        meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        settings = [extra | ON_LOOPBACK | {"VLLM_CPU_OMP_THREADS_BIND": core} for core in bound]
        command = [str(BIN / "vllm"), "serve", str(model), "--served-model-name", MODEL_NAME, "--headless",
                   "--dtype", "float32", "--enforce-eager", "--node-rank", "1", *meeting, *flags]  # fmt: skip
        self.follower = Child(f"{name}-follower", self.runtimes[1], command, settings[1])
        super().__init__(name, model, self.runtimes[0], [*flags, *meeting, "--node-rank", "0"], settings[0])

    def note_shared(self) -> None:
        """Note the files that both nodes have in shared memory."""
        super().note_shared()
        self.follower.note_shared()

    def text(self) -> str:
        """Return both logs so far."""
        return super().text() + self.follower.text()

    def close(self) -> None:
        """End both nodes."""
        super().close()
        self.follower.close()
