"""Run the rounds of benchmarks.engine.throughput on one vLLM engine, and write the measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.engine.rounds import Rounds, arguments
from benchmarks.lib import vllm_engine


class VllmRounds(Rounds):
    """Stock or elastic vLLM."""

    def start(self, kv_bytes: int, settings: dict[str, Any]) -> None:
        model = vllm_engine.model_folder(self.options.model)
        ranks = self.options.tensor_parallel
        self.llm = vllm_engine.engine(
            self.options.backend, model, kv_bytes, settings, tensor_parallel_size=ranks
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        batch = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(batch, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def flush(self) -> None:
        self.llm.reset_prefix_cache()

    def free_bytes(self) -> list[int]:
        return vllm_engine.free_bytes(self.llm)


if __name__ == "__main__":
    VllmRounds(arguments("engine.vllm_rounds", __doc__)).run()
