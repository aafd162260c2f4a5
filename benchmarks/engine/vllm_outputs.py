"""Answer the prompts of benchmarks.engine.outputs with vLLM."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.engine.outputs import Answer, rounds_of_prompts, settings
from benchmarks.lib import vllm_engine

TOKENS = 64


def generate(options: argparse.Namespace) -> list[Answer]:
    """Run one engine over all rounds."""
    from vllm import SamplingParams

    llm = vllm_engine.engine(
        options.backend, vllm_engine.model_folder(options.model), int(options.kv_gib * 2**30),
        settings(options),
        tensor_parallel_size=options.tensor_parallel,
    )  # fmt: skip
    llm.collective_rpc("bench_randomize", args=(7, options.deviation))
    sampling = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=2, detokenize=False
    )
    answers: list[Answer] = []
    for prompts in rounds_of_prompts(options):
        batch: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        for output in llm.generate(batch, sampling, use_tqdm=False):
            completion = output.outputs[0]
            answers.append(
                [_choice(t, p) for t, p in zip(completion.token_ids, completion.logprobs, strict=True)]
            )
    return answers


def _choice(token: int, candidates: dict[int, Any]) -> tuple[int, float]:
    best = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)
    return token, float(best[0] - best[1])
