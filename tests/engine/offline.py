"""An engine in a Python program: `python -m tests.engine.offline {elastic,bare} MODEL`.

Reads a list of [tokens, max_tokens] from PROMPTS_FILE and prints the ids as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PROMPTS_VARIABLE, ANSWER = "PROMPTS_FILE", "offline answer: "


def main(how: str, model: str) -> None:
    """Generate and print."""
    from vllm import LLM, SamplingParams

    import vllm_kvcached

    settings = {"name": "offline", "host_capacity": "200MiB", "headroom": "16MiB"}
    chosen = vllm_kvcached.llm_kwargs(**settings) if how == "elastic" else {}
    llm = LLM(model=model, dtype="float32", max_model_len=2048, enforce_eager=True, **chosen)
    prompts = json.loads(Path(os.environ[PROMPTS_VARIABLE]).read_text())
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        for _, count in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens, _ in prompts], sampling)
    print(ANSWER + json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
