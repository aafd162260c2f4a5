"""An engine that does what lines of JSON ask for: the child process of the benchmarks of sharing.

Answers go to a descriptor of their own, a line of JSON each, with the `id` of what they answer. The first,
with the id 0, says that the engine serves. It ends when its input does.
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
    """Requests that came together; `tokens` were generated, `failed` ended without all of theirs."""

    id: int
    left: int
    generate: int
    keeps: bool
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0
    failed: int = 0
    outputs: dict[int, list[int]] = field(default_factory=dict)

    def answer(self) -> dict[str, Any]:
        """Return what is said at its end; times are of the monotonic clock, in seconds."""
        kept = [self.outputs[index] for index in sorted(self.outputs)]
        return {"id": self.id, "tokens": self.tokens, "failed": self.failed, "outputs": kept,
                "started": self.started, "ended": time.monotonic()}  # fmt: skip


class Child:
    """Serves bursts, and a background of long generations that are begun anew as they end."""

    def __init__(self, llm: Any, vocabulary: int, answers: TextIO) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self._vocabulary = vocabulary
        self._answers = answers
        self._bursts: dict[int, Burst] = {}
        self._background: dict[str, int] = {"count": 0, "length": 1, "generate": 1}
        self._running = self._begun = 0  # background requests
        self._steps: deque[tuple[float, int]] = deque(maxlen=STEPS_KEPT)  # when, and its background tokens

    def run(self, commands: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        """Serve until None comes."""
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
        """Generate for `count` prompts of `length` random tokens. `salt` keeps them off the prefix cache."""
        drawn = vllm_engine.prompts(count, length, seed, self._vocabulary)
        self._bursts[id] = Burst(id, count, generate, keeps)
        for index, prompt in enumerate(drawn):
            self._add(f"{id}/{index}", prompt | ({"cache_salt": salt} if salt else {}), generate)

    def do_background(self, id: int, count: int, length: int, generate: int) -> None:
        """From now on keep `count` generations running."""
        self._background = {"count": count, "length": length, "generate": generate}
        self._fill_background()
        self._say({"id": id})

    def do_steps(self, id: int) -> None:
        """Return when steps brought tokens of the background, and how many, since this was last asked."""
        self._say({"id": id, "steps": list(self._steps)})
        self._steps.clear()

    def do_randomize(self, id: int, seed: int, deviation: float) -> None:
        """Draw weights by which outputs depend on the cache."""
        self._llm.collective_rpc("bench_randomize", args=(seed, deviation))
        self._say({"id": id})

    def do_flush(self, id: int) -> None:
        """Forget the prefix cache; nothing runs."""
        self._say({"id": id, "done": self._llm.reset_prefix_cache()})

    def do_check(self, id: int) -> None:
        """Let every rank check its pool: each has done all plans in order, and adds up."""
        self._llm.collective_rpc("kvcached_check")
        self._say({"id": id})

    def do_profile(self, id: int) -> None:
        """From now on record what the device does."""
        self._llm.collective_rpc("bench_profile")
        self._say({"id": id})

    def do_profiled(self, id: int) -> None:
        """Return what the first rank's device did since."""
        self._say({"id": id, "profile": self._llm.collective_rpc("bench_profiled")[0]})

    def do_sleep(self, id: int, level: int) -> None:
        """Sleep; the answer has the seconds it took."""
        begun = time.monotonic()
        self._llm.sleep(level)
        self._say({"id": id, "seconds": time.monotonic() - begun})

    def do_wake(self, id: int) -> None:
        """Wake; the answer has the seconds it took, waiting for room included."""
        begun = time.monotonic()
        self._llm.wake_up()
        self._say({"id": id, "seconds": time.monotonic() - begun})

    def say_ready(self) -> None:
        """Say that the engine serves, and what it goes by."""
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
    """Read the command line of a child, whatever its engine."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", choices=vllm_engine.BACKENDS, default="kvcached")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--answers", type=int, required=True, help="descriptor")
    parser.add_argument("--options", type=json.loads, default={}, help="settings of kvcached, as JSON")
    parser.add_argument("--arguments", type=json.loads, default={}, help="arguments of the engine, as JSON")
    parser.add_argument("--vocabulary", type=int, required=True)
    options = parser.parse_args()
    os.set_inheritable(options.answers, False)
    return options


def main() -> None:
    """Load and serve."""
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
