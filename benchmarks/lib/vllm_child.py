"""A child process with a vLLM engine that carries out commands, for benchmarks with several engines.

Commands are lines of JSON on standard input. Answers are lines of JSON on the descriptor `--answers`, each
with the `id` of its command. The first answer has the id 0 and means that the engine serves. The process ends
when its input ends.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.lib import vllm_engine

STEPS_KEPT = 20_000


@dataclass
class Burst:
    """The requests of one command: `tokens` generated so far, and `failed` requests with too few tokens."""

    id: int
    left: int
    generate: int
    keeps: bool
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0
    failed: int = 0
    outputs: dict[int, list[int]] = field(default_factory=dict)

    def answer(self) -> dict[str, Any]:
        """Return the answer to the command; times are seconds of the monotonic clock."""
        kept = [self.outputs[index] for index in sorted(self.outputs)]
        return {"id": self.id, "tokens": self.tokens, "failed": self.failed, "outputs": kept,
                "started": self.started, "ended": time.monotonic()}  # fmt: skip


class Child:
    """Serves bursts, and a fixed number of long background generations: when one ends, a new one begins."""

    def __init__(self, llm: Any, vocabulary: int, answers: TextIO) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self._vocabulary = vocabulary
        self._answers = answers
        self._bursts: dict[int, Burst] = {}
        self._background: dict[str, int] = {"count": 0, "length": 1, "generate": 1}
        self._running = self._begun = 0  # background requests
        self._steps: deque[tuple[float, int]] = deque(maxlen=STEPS_KEPT)  # (time, background tokens)

    def run(self, commands: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        """Carry out commands until None is read from the queue."""
        while True:
            is_idle = not self._engine.has_unfinished_requests()
            while is_idle or not commands.empty():
                command = commands.get()
                if command is None:
                    return
                getattr(self, f"do_{command.pop('do')}")(**command)
                is_idle = not self._engine.has_unfinished_requests()
            for output in self._engine.step():
                self._note(output)

    def do_burst(
        self, id: int, count: int, length: int, generate: int, seed: int, salt: str, keeps: bool
    ) -> None:
        """Generate for `count` prompts of `length` random tokens; a new `salt` avoids prefix cache hits."""
        drawn = vllm_engine.prompts(count, length, seed, self._vocabulary)
        self._bursts[id] = Burst(id, count, generate, keeps)
        for index, prompt in enumerate(drawn):
            self._add(f"{id}/{index}", prompt | ({"cache_salt": salt} if salt else {}), generate)

    def do_background(self, id: int, count: int, length: int, generate: int) -> None:
        """Keep `count` generations running from now on."""
        self._background = {"count": count, "length": length, "generate": generate}
        self._fill_background()
        self._say({"id": id})

    def do_steps(self, id: int) -> None:
        """Send the time and the background tokens of each step since the last call."""
        self._say({"id": id, "steps": list(self._steps)})
        self._steps.clear()

    def do_randomize(self, id: int, seed: int, deviation: float) -> None:
        """Draw random weights, with which outputs depend on the content of the KV cache."""
        self._llm.collective_rpc("bench_randomize", args=(seed, deviation))
        self._say({"id": id})

    def do_flush(self, id: int) -> None:
        """Drop the prefix cache; no request may run."""
        self._say({"id": id, "done": self._llm.reset_prefix_cache()})

    def do_check(self, id: int) -> None:
        """Make every rank check its pool: all plans were applied in order, and the sums are right."""
        self._llm.collective_rpc("kvcached_check")
        self._say({"id": id})

    def do_profile(self, id: int) -> None:
        """Start recording the device's kernels."""
        self._llm.collective_rpc("bench_profile")
        self._say({"id": id})

    def do_profiled(self, id: int) -> None:
        """Send a summary of the kernels on the first rank's device since do_profile."""
        self._say({"id": id, "profile": self._llm.collective_rpc("bench_profiled")[0]})

    def do_sleep(self, id: int, level: int) -> None:
        """Put the engine to sleep; the answer has the seconds that it took."""
        begun = time.monotonic()
        self._llm.sleep(level)
        self._say({"id": id, "seconds": time.monotonic() - begun})

    def do_wake(self, id: int) -> None:
        """Wake the engine; the answer has the seconds that it took, with the wait for memory."""
        begun = time.monotonic()
        self._llm.wake_up()
        self._say({"id": id, "seconds": time.monotonic() - begun})

    def say_ready(self) -> None:
        """Send the first answer: the engine serves, with these sizes."""
        config = self._engine.vllm_config
        self._say({"id": 0, "block_tokens": config.cache_config.block_size,
                   "max_model_len": config.model_config.max_model_len,
                   "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens})  # fmt: skip

    def _add(self, name: str, prompt: dict[str, Any], generate: int, each_step: bool = False) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if each_step else RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(
            temperature=0.0, max_tokens=generate, ignore_eos=True, detokenize=False, output_kind=kind
        )
        self._engine.add_request(name, prompt, sampling)

    def _fill_background(self) -> None:
        wanted = self._background
        while self._running < wanted["count"]:
            self._begun += 1
            self._running += 1
            prompt = vllm_engine.prompts(1, wanted["length"], -self._begun, self._vocabulary)[0]
            self._add(f"background/{self._begun}", prompt, wanted["generate"], each_step=True)

    def _note(self, output: Any) -> None:
        tokens = list(output.outputs[0].token_ids)
        group, _, index = output.request_id.partition("/")
        if group == "background":
            self._steps.append((time.monotonic(), len(tokens)))
            if output.finished:
                self._running -= 1
                self._fill_background()
        elif output.finished:
            burst = self._bursts[int(group)]
            burst.left -= 1
            burst.tokens += len(tokens)
            burst.failed += len(tokens) != burst.generate
            if burst.keeps:
                burst.outputs[int(index)] = tokens
            if not burst.left:
                self._say(self._bursts.pop(burst.id).answer())

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def read_commands(commands: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Put every line of standard input into a queue, and None at its end."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)


def arguments(description: str | None) -> argparse.Namespace:
    """Read the command line of a child of either engine."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", choices=vllm_engine.BACKENDS, default="kvcached")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--answers", type=int, required=True, help="file descriptor for the answers")
    parser.add_argument("--options", type=json.loads, default={}, help="settings of kvcached, as JSON")
    parser.add_argument("--arguments", type=json.loads, default={}, help="arguments of the engine, as JSON")
    parser.add_argument("--vocabulary", type=int, required=True)
    options = parser.parse_args()
    os.set_inheritable(options.answers, False)
    return options


def main() -> None:
    """Start the engine and serve commands until the input ends."""
    options = arguments(__doc__)
    more = {"tensor_parallel_size": options.ranks} | options.arguments
    llm = vllm_engine.engine(options.backend, options.model, None, options.options, **more)
    with os.fdopen(options.answers, "w") as answers:
        child = Child(llm, options.vocabulary, answers)
        child.say_ready()
        commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=read_commands, args=(commands,), daemon=True).start()
        child.run(commands)


if __name__ == "__main__":
    main()
