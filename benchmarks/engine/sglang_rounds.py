"""Run the rounds of benchmarks.engine.throughput on one SGLang engine, and write the measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.engine.rounds import Rounds, arguments
from benchmarks.lib import sglang_engine, vllm_engine


class SglangRounds(Rounds):
    """Stock or elastic SGLang."""

    def start(self, kv_bytes: int, settings: dict[str, Any]) -> None:
        model = vllm_engine.model_folder(self.options.model)
        self.engine = sglang_engine.engine(
            self.options.backend, model, kv_bytes, settings, self.options.requests,
            ranks=self.options.tensor_parallel, load_format="dummy",
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        answers = sglang_engine.generate(self.engine, prompts, tokens)
        return sum(len(answer["output_ids"]) for answer in answers)

    def flush(self) -> None:
        sglang_engine.flush(self.engine)

    def free_bytes(self) -> list[int]:
        return sglang_engine.free_bytes(self.options.tensor_parallel)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.engine.shutdown()


if __name__ == "__main__":
    SglangRounds(arguments("engine.sglang_rounds", __doc__)).run()
