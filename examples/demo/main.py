"""The course of the demo: serve a real model, load it, lower and lift its limit, watch its memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from examples.demo import load, memory, picture, server, summary
from examples.demo.process import child, no_survivors, tail
from examples.demo.server import BIN, NAME, DemoError, Place
from examples.demo.view import View
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.runtime import Runtime
from kvcached_core.units import format_size, parse_size

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "demo"
MODEL = ROOT / "build" / "models" / "smollm2"
LOWERED = "72MiB"
BURST, AT_ONCE, MAX_TOKENS = 24, 12, 56  # requests, of them at the same time, tokens each
IDLE_SECONDS = 8.0  # longer than spare memory is kept
CONTROL_SECONDS = 30
INTERRUPTED = 128 + signal.SIGINT


class Course:
    """One run against a server that is ready."""

    def __init__(self, place: Place, environ: dict[str, str], view: View) -> None:
        self.recorder = memory.Recorder(Runtime.open(place.runtime), NAME)
        self.outcomes: list[load.Outcome] = []
        self._place, self._environ, self._view = place, environ, view

    async def run(self) -> summary.Held:
        """Drive the load and return what was held when; raises DemoError or KVCachedError."""
        self.recorder.sample()
        async with httpx.AsyncClient(base_url=self._place.url, timeout=180.0) as client:
            with self._view.live():
                steps = asyncio.ensure_future(self._steps(client))
                watch = asyncio.ensure_future(self.recorder.run(self._view.show))
                try:
                    # the watch never ends by itself: if it does, it failed
                    await asyncio.wait({steps, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if watch.done():
                        watch.result()
                    return await steps
                finally:
                    steps.cancel()
                    watch.cancel()
                    await asyncio.gather(steps, watch, return_exceptions=True)

    async def _steps(self, client: httpx.AsyncClient) -> summary.Held:
        start = self.recorder.samples[0].held
        await self._burst(client, 1, "burst 1")
        peak = self.recorder.peak()
        idle = await self._idle()
        await self._limit(LOWERED)
        after_limit = await self._idle(2.0)
        await self._burst(client, 2, f"burst 2, within {LOWERED}")
        await self._idle(3.0)
        await self._limit(server.LIMIT)
        lifted = self.recorder.marks[-1].at_seconds
        await self._burst(client, 3, "burst 3")
        peak_after_lift = self.recorder.peak(lifted)
        end = await self._idle()
        lowered = parse_size(LOWERED).of(0)
        return summary.Held(start, peak, idle, idle, after_limit, lowered, peak_after_lift, end)

    async def _burst(self, client: httpx.AsyncClient, number: int, text: str) -> None:
        self._note(text)
        requests = load.questions(BURST, number, MAX_TOKENS)
        outcomes = await load.burst(client, text, requests, AT_ONCE)
        self.outcomes += outcomes
        failures = [outcome.error for outcome in outcomes if outcome.error]
        self._note(f"{len(outcomes) - len(failures)} of {len(outcomes)} answered")
        for error in failures[:3]:
            self._view.say(f"failed: {error}")

    async def _idle(self, seconds: float | None = None) -> int:
        """Let the engine be idle, and return what it holds then."""
        await asyncio.sleep(IDLE_SECONDS if seconds is None else seconds)
        return self.recorder.sample().held

    async def _limit(self, size: str) -> None:
        """Set the limit with kvctl, which waits until it holds."""
        self._note(f"kvctl limit {NAME} {size}")
        process = await asyncio.create_subprocess_exec(
            BIN / "kvctl", "limit", NAME, size,
            env=self._environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        printed, _ = await asyncio.wait_for(process.communicate(), CONTROL_SECONDS)
        for line in printed.decode().splitlines():
            self._view.say(f"    {line}")
        if process.returncode:
            raise DemoError(f"kvctl limit {NAME} {size} ended with status {process.returncode}")

    def _note(self, text: str) -> None:
        self.recorder.mark(text)
        self._view.say(text)


def make_model(view: View) -> None:
    """Make the model folder if it is not there, in a process of its own, and say so while it lasts."""
    if (MODEL / "config.json").exists():
        return
    view.say("making the model folder of SmolLM2-135M from its GGUF file (about 40 s)")
    log = BUILD / "model.log"
    command = [sys.executable, "-m", "tests.models", "smollm2", str(MODEL)]
    with child(command, os.environ | {"PYTHONPATH": str(ROOT)}, log) as process:
        waited = 0
        while process.poll() is None:
            time.sleep(1)
            waited += 1
            if waited % 10 == 0:
                view.say(f"making the model folder, {waited} s")
        if process.returncode:
            raise DemoError(f"the model could not be made:\n{tail(log)}")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder of our own in shared memory; it is gone at the end, whatever is in it."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="kvdemo-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(view: View) -> bool:
    """Run the whole demo; returns whether everything was as it should be."""
    begun = time.monotonic()
    BUILD.mkdir(parents=True, exist_ok=True)
    with no_survivors(), scratch_folder() as scratch:
        make_model(view)
        place = Place(server.free_port(), scratch)
        environ = server.environment(place, BUILD / "cache")
        log = BUILD / "server.log"
        view.say(
            f"starting vllm serve with --kv-cache-backend kvcached (about 45 s; log: {log.relative_to(ROOT)})"
        )
        with child(server.command(MODEL, place), environ, log) as process:
            try:
                seconds = server.wait_until_ready(process, place.url, view.say)
                view.say(f"the server is ready after {seconds:.0f} s")
                course = Course(place, environ, view)
                held = asyncio.run(course.run())
            except (DemoError, KVCachedError) as error:
                raise DemoError(f"{error}\n--- the end of {log}:\n{tail(log)}") from error
            view.say("stopping the server")
    return report(view, course, held, time.monotonic() - begun)


def report(view: View, course: Course, held: summary.Held, wall_seconds: float) -> bool:
    """Write picture and summary, print the table; returns whether everything was as it should be."""
    samples, marks = course.recorder.samples, course.recorder.marks
    title = (
        f"{server.MODEL_NAME} on vLLM with an elastic KV cache: peak {format_size(course.recorder.peak())}"
    )
    drawn, written = BUILD / "memory.png", BUILD / "summary.json"
    picture.draw(drawn, samples, marks, title)
    result = summary.summarise(course.outcomes, held, wall_seconds)
    summary.write(written, result)
    view.console.print(summary.table(result))
    view.say(f"picture: {drawn.relative_to(ROOT)}, numbers: {written.relative_to(ROOT)}")
    return all(result["verdicts"].values())


def main() -> int:
    """Run the demo; returns 0 if all was as it should be, 1 if not, 130 if it was interrupted."""
    view = View()
    # also where a shell started this in the background, which ignores SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # as Ctrl-C, also inside asyncio, which turns that into an orderly end of its tasks
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        return 0 if run(view) else 1
    except DemoError as error:
        view.say(f"the demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        view.say("interrupted; everything is stopped and removed")
        return INTERRUPTED
