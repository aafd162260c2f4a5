"""Like benchmarks.lib.vllm_child, a child process with an engine, here SGLang. Bursts run one by one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.lib import profiles, sglang_engine, vllm_engine
from benchmarks.lib.vllm_child import arguments

RUNNING = 64  # most requests that run at once
PAGE_TOKENS = 16
HOST_TOKENS = 1 << 16


class Child:
    """Carries out commands (lines of JSON), one after the other."""

    def __init__(self, engine: Any, vocabulary: int, answers: TextIO) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._answers = answers
        self._traces = Path()

    def do_burst(
        self, id: int, count: int, length: int, generate: int, seed: int, salt: str, keeps: bool
    ) -> None:
        """Generate for `count` prompts of `length` random tokens. Raises ValueError for a salt."""
        if salt:
            raise ValueError(f"the salt {salt!r} was given: SGLang has none, use another seed")
        drawn = vllm_engine.prompts(count, length, seed, self._vocabulary)
        started = time.monotonic()
        prompts = [prompt["prompt_token_ids"] for prompt in drawn]
        outputs = [each["output_ids"] for each in sglang_engine.generate(self._engine, prompts, generate)]
        self.say({"id": id, "tokens": sum(map(len, outputs)), "outputs": outputs if keeps else [],
                  "failed": sum(len(output) != generate for output in outputs),
                  "started": started, "ended": time.monotonic()})  # fmt: skip

    def do_flush(self, id: int) -> None:
        """Drop the prefix cache."""
        sglang_engine.flush(self._engine)
        self.say({"id": id, "done": True})

    def do_profile(self, id: int) -> None:
        """Start recording the device's kernels."""
        self._traces = Path(tempfile.mkdtemp(prefix="kvcached-trace-"))
        self._engine.start_profile(
            output_dir=str(self._traces),
            activities=["GPU" if sglang_engine.on_gpu() else "CPU"],
            with_stack=False,
            record_shapes=False,
        )
        self.say({"id": id})

    def do_profiled(self, id: int) -> None:
        """Send a summary of the kernels on the first rank's device since do_profile."""
        self._engine.stop_profile()
        self.say({"id": id, "profile": profiles.summary(profiles.read(self._traces))})
        shutil.rmtree(self._traces)

    def do_check(self, id: int) -> None:
        """Answer. A rank that gets a plan out of order ends the engine, so an answer means success."""
        self.say({"id": id})

    def say(self, answer: dict[str, Any]) -> None:
        """Write an answer as a line of JSON."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def main() -> None:
    """Start the engine and serve commands until the input ends."""
    options = arguments(__doc__)
    more = {"load_format": "dummy", "page_size": PAGE_TOKENS} | options.arguments
    if options.backend == "stock" and not sglang_engine.on_gpu():
        more["max_total_tokens"] = HOST_TOKENS  # otherwise stock SGLang takes most of the machine's memory
    engine = sglang_engine.engine(
        options.backend, options.model, None, options.options, RUNNING, ranks=options.ranks, **more
    )
    engine.freeze_gc()  # otherwise some round includes a garbage collection of all modules
    with os.fdopen(options.answers, "w") as answers:
        child = Child(engine, options.vocabulary, answers)
        length = engine.server_args.context_length
        child.say({"id": 0, "block_tokens": PAGE_TOKENS, "max_model_len": length,
                   "max_num_batched_tokens": engine.server_args.chunked_prefill_size})  # fmt: skip
        for line in sys.stdin:
            command = json.loads(line)
            getattr(child, f"do_{command.pop('do')}")(**command)
    engine.shutdown()


if __name__ == "__main__":
    main()
