"""One SGLang engine, several rounds; writes what it saw. Run by benchmarks.throughput, which compares two."""

from __future__ import annotations

from typing import Any

from benchmarks import gpu_rig, sglang_rig
from benchmarks.rounds import Rounds, arguments


class SglangRounds(Rounds):
    """Stock or elastic SGLang."""

    def start(self, kv_bytes: int, settings: dict[str, Any]) -> None:
        model = gpu_rig.model_folder(self.options.model)
        self.engine = sglang_rig.engine(
            self.options.backend, model, kv_bytes, settings, self.options.requests,
            ranks=self.options.tensor_parallel, load_format="dummy",
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        answers = sglang_rig.generate(self.engine, prompts, tokens)
        return sum(len(answer["output_ids"]) for answer in answers)

    def flush(self) -> None:
        sglang_rig.flush(self.engine)

    def free_bytes(self) -> list[int]:
        return sglang_rig.free_bytes(self.options.tensor_parallel)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.engine.shutdown()


if __name__ == "__main__":
    SglangRounds(arguments(__doc__)).run()
