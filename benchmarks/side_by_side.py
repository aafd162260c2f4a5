"""Two vLLM engines of the shape of Llama-8B on one GPU, each with vLLM's default share of it (0.9).

    python -m benchmarks.side_by_side --out benchmarks/results/side_by_side.json

Stock vLLM refuses to start the second. Here B starts while A keeps its prefix cache; then A and B have peaks
in turn, and when A's limit is lowered B gets the memory. The ledger is sampled throughout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import vllm_engine
from benchmarks.lib.record import write
from kvcached_core.ledger import Runtime, set_limit, snapshot, wait_until_holds
from kvcached_core.units import GIB

SAMPLE_SECONDS = 0.05


def serve(name: str, model: Path) -> None:
    """Be an engine: answer each line `COUNT PROMPT GENERATE` on standard input with a line of JSON."""
    from vllm import SamplingParams

    llm = vllm_engine.engine("kvcached", vllm_engine.model_folder(model), None, {"name": name})
    print("\nREADY", flush=True)
    for seed, line in enumerate(sys.stdin):
        count, length, generate = (int(word) for word in line.split())
        sampling = SamplingParams(temperature=0.0, max_tokens=generate, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = llm.generate(vllm_engine.prompts(count, length, seed), sampling, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        answer = {
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
            "free": vllm_engine.free_bytes(llm)[0],
        }
        print(f"\nDONE {json.dumps(answer)}", flush=True)


class Engine:
    """A child process that serves."""

    def __init__(self, name: str, model: Path, logs: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.side_by_side", "--serve", name, "--model", str(model)]
        logs.mkdir(parents=True, exist_ok=True)
        log = (logs / f"side-by-side-{name}.log").open("w")
        self.name = name
        started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        self._wait_for("READY")
        self.start_seconds = time.monotonic() - started

    def burst(self, count: int, length: int, generate: int) -> dict[str, float]:
        """Send one burst and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count} {length} {generate}\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._wait_for("DONE"))
        return answer

    def kill(self) -> None:
        """End it and its engine core at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_for(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise RuntimeError(f"engine {self.name} ended with status {self._process.wait()}: see its log")


class Watch:
    """Samples what each engine holds, and notes events."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.started = time.monotonic()
        self.samples: dict[str, list[float]] = {"time_seconds": [], "a_held_bytes": [], "b_held_bytes": []}
        self.events: list[tuple[float, str]] = []
        self._over = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def note(self, text: str) -> None:
        """Note an event."""
        self.events.append((time.monotonic() - self.started, text))
        print(f"{self.events[-1][0]:7.1f} s  {text}", flush=True)

    def stop(self) -> None:
        """Sample no more."""
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            owners = [owner for device in snapshot(self._runtime) for owner in device.owners if owner.live]
            held = {owner.name: float(owner.ready_bytes) for owner in owners}
            self.samples["time_seconds"].append(time.monotonic() - self.started)
            for name in "ab":
                self.samples[f"{name}_held_bytes"].append(held.get(name, 0.0))


def play(model: Path, logs: Path, runtime: Runtime) -> tuple[Watch, dict[str, Any]]:
    """Run the scene; returns the samples and what the bursts said."""
    watch, said = Watch(runtime), {}
    engines: list[Engine] = []
    try:
        engines.append(a := Engine("a", model, logs))
        watch.note(f"A serves after {a.start_seconds:.0f} s")
        said["a_1"] = a.burst(256, 512, 128)
        watch.note("A had a peak and keeps its prefix cache")
        engines.append(b := Engine("b", model, logs))
        watch.note(f"B serves after {b.start_seconds:.0f} s, beside A's cache")
        said["b_1"] = b.burst(128, 512, 128)
        watch.note("B had a peak")
        threads = [threading.Thread(target=lambda e=e, n=n: said.update({n: e.burst(96, 512, 128)}))
                   for e, n in ((a, "a_2"), (b, "b_2"))]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.note("both had a peak at once")
        change = set_limit(runtime, "a", 2 * GIB)
        outcome = wait_until_holds(runtime, change, 10.0)
        watch.note(
            f"A's limit is 2 GiB, and {'holds' if all(one.holds for one in outcome) else 'does not hold'}"
        )
        said["b_3"] = b.burst(256, 900, 128)
        watch.note("B had a peak of more than half of the memory")
        a.kill()
        watch.note("A was killed in idleness")
        said["b_4"] = b.burst(64, 512, 128)
        watch.note("B goes on")
    finally:
        for engine in engines:
            engine.kill()
        watch.stop()
    return watch, said


def main() -> None:
    """Play and write, or be an engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, default=Path("build/bench/llama-8b"))
    parser.add_argument("--logs", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.model)
        return
    started = time.time()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="kvcached-bench-") as folder:
        os.environ["KVCACHED_RUNTIME_DIR"] = folder
        watch, said = play(options.model, options.logs, Runtime.open(folder))
    samples = dict(watch.samples)
    for name, answer in said.items():
        samples[f"{name}_tokens_per_second"] = [answer["tokens"] / answer["seconds"]]
        samples[f"{name}_free_after_bytes"] = [answer["free"]]
    write(options.out, sys.argv, samples, {}, started, {"events": watch.events})


if __name__ == "__main__":
    main()
