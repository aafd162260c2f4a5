"""Start two servers on one memory budget, run the demo's steps against them, and report."""

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

from devkit.processes import interrupt_on_signals, no_survivors
from examples.demo import picture, server, summary
from examples.demo.course import Course
from examples.demo.memory import Recorder
from examples.demo.process import Command, children, tail
from examples.demo.server import DemoError
from examples.demo.view import View
from kvcached_core.errors import KVCachedError
from kvcached_core.ledger.file.runtime import Runtime
from kvcached_core.units import format_size

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "demo"
MODEL = ROOT / "build" / "models" / "smollm2"
INTERRUPTED = 128 + signal.SIGINT


def make_model(view: View) -> None:
    """Make the model folder in a separate process if it is missing, and print progress."""
    if (MODEL / "config.json").exists():
        return
    view.say("making the model folder of SmolLM2-135M from its GGUF file (about 40 s)")
    log = BUILD / "model.log"
    command = [sys.executable, "-m", "devkit.models", "smollm2", str(MODEL)]
    making = Command(command, os.environ | {"PYTHONPATH": str(ROOT)}, log)
    with children([making]) as (process,):
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
    """Yield an empty folder in shared memory; it is removed at the end."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="kvdemo-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(view: View) -> bool:
    """Run the whole demo; return whether all expectations hold."""
    begun = time.monotonic()
    BUILD.mkdir(parents=True, exist_ok=True)
    with no_survivors(), scratch_folder() as scratch:
        make_model(view)
        engines = server.make_engines(server.parse_kinds(os.environ.get("ENGINES", "")))
        environ = server.environment(scratch, BUILD / "cache")
        logs = {engine: BUILD / f"{engine.name}.log" for engine in engines}
        view.say(f"{server.title(engines)} start on one budget of {server.BUDGET}: a minute on two cores")
        view.say(f"logs: {', '.join(str(log.relative_to(ROOT)) for log in logs.values())}")
        try:
            with children(server.commands(MODEL, engines, environ, logs)) as processes:
                server.wait_until_ready(dict(zip(engines, processes, strict=True)), view.say)
                course = Course(engines, Runtime.open(server.runtime(scratch)), environ, view)
                result = asyncio.run(course.run())
                view.say("stopping the servers")
        except (DemoError, KVCachedError) as error:
            ends = [f"--- the end of {log}:\n{tail(log)}" for log in logs.values() if log.exists()]
            raise DemoError("\n".join([str(error), *ends])) from error
    return report(view, server.title(engines), course.recorder, result, time.monotonic() - begun)


def report(view: View, who: str, recorder: Recorder, run: summary.Run, wall_seconds: float) -> bool:
    """Write the picture and the summary, print the table; return whether all expectations hold."""
    title = f"{who} with SmolLM2-135M share {format_size(run.budget)} of KV memory"
    drawn, written = BUILD / "memory.png", BUILD / "summary.json"
    picture.draw(drawn, recorder.samples, recorder.marks, title)
    result = summary.summarise(run, wall_seconds)
    summary.write(written, result)
    view.console.print(summary.table(result))
    view.say(f"picture: {drawn.relative_to(ROOT)}, numbers: {written.relative_to(ROOT)}")
    return all(result["verdicts"].values())


def main() -> int:
    """Run the demo; return 0 if all expectations hold, 1 if not, 130 after an interrupt."""
    view = View()
    interrupt_on_signals()
    try:
        return 0 if run(view) else 1
    except DemoError as error:
        view.say(f"the demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        view.say("interrupted; everything is stopped and removed")
        return INTERRUPTED
