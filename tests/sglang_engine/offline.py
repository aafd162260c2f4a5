"""An engine in a Python program: `python -m tests.sglang_engine.offline MODEL`.

Reads a list of [tokens, max_tokens] from PROMPTS_FILE and prints, as one line of JSON, the ids and what the
ledger shows.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PROMPTS_VARIABLE, ANSWER = "PROMPTS_FILE", "offline answer: "


def main(model: str) -> None:
    """Generate and print."""
    import sglang

    import sglang_kvcached
    from devkit.watch import owners

    with sglang_kvcached.elastic(name="offline", host_capacity="200MiB", headroom="16MiB"):
        engine = sglang.Engine(
            model_path=model, device="cpu", attention_backend="torch_native", dtype="float32",
            context_length=2048, page_size=16, max_running_requests=8,
        )  # fmt: skip
    prompts = json.loads(Path(os.environ[PROMPTS_VARIABLE]).read_text())
    sampling = [{"temperature": 0, "max_new_tokens": count, "ignore_eos": True} for _, count in prompts]
    outputs = engine.generate(input_ids=[tokens for tokens, _ in prompts], sampling_params=sampling)
    shown = [
        [owner.name, owner.ready_bytes > 0] for owner in owners(Path(os.environ["KVCACHED_RUNTIME_DIR"]))
    ]
    print(
        ANSWER + json.dumps({"ids": [each["output_ids"] for each in outputs], "elastic": shown}), flush=True
    )
    engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
