"""Run every GPU benchmark, one after the other: `python -m benchmarks.gpu_suite`.

Each step is a benchmark in its own process group, with a time limit. A step that fails or exceeds its limit
does not stop the others. The results, named as in benchmarks/results, and the logs are written to the folder
`--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ENGINES = ("vllm", "sglang")
KILL_SECONDS = 30.0  # time for an interrupted benchmark to end its engines


class Step(NamedTuple):
    """A benchmark: the engine whose packages it needs, its time limit, its module and its options.

    `logs`: the benchmark has the option --logs. `headroom`: it has the option --headroom, for large GPUs.
    """

    engine: str
    seconds: int
    module: str
    options: str = ""
    logs: bool = True
    headroom: bool = False


# Steps that a change of the driver may break come first.
STEPS = {
    "driver": Step("vllm", 120, "pytest",
                   "-q -p no:cacheprovider tests/core/test_driver_cuda.py tests/core/test_driver_gpu.py",
                   logs=False),
    "burst": Step("vllm", 60, "benchmarks.micro.burst", logs=False),
    "vllm_outputs": Step("vllm", 240, "benchmarks.engine.outputs", "--engine vllm --rounds 4"),
    "fence_stress": Step("vllm", 90, "benchmarks.micro.fence_stress", "--rounds 10000", logs=False),
    "vllm_alternating": Step("vllm", 420, "benchmarks.engine.alternating", "--engine vllm --rounds 6"),
    "sglang_layouts": Step("sglang", 120, "benchmarks.micro.sglang_layouts", logs=False),
    "sglang_outputs_layer": Step("sglang", 300, "benchmarks.engine.outputs",
                                 "--engine sglang --rounds 4 --option layout=layer"),
    "sglang_outputs_block": Step("sglang", 300, "benchmarks.engine.outputs",
                                 "--engine sglang --rounds 4 --option layout=block"),
    "sglang_alternating": Step("sglang", 600, "benchmarks.engine.alternating",
                               "--engine sglang --rounds 10 --phases growing full steady"),
    "sglang_alternating_layer": Step("sglang", 600, "benchmarks.engine.alternating",
                                     "--engine sglang --rounds 10 --phases growing full steady "
                                     "--option layout=layer"),
    "sleep": Step("vllm", 240, "benchmarks.engine.sleep", "--rounds 3", headroom=True),
    "sharing": Step("vllm", 540, "benchmarks.sharing.one_gpu"),
    "beside": Step("vllm", 420, "benchmarks.sharing.beside", logs=False, headroom=True),
    "reclaim": Step("vllm", 600, "benchmarks.sharing.reclaim", "--rounds 30"),
}  # fmt: skip


class Settings(NamedTuple):
    """Each engine's Python and folder of packages, and the folder for results."""

    out: Path
    pythons: dict[str, str]
    sites: dict[str, Path | None]
    headroom: str | None = None


def command(name: str, settings: Settings) -> list[str]:
    """Return the command line of a step."""
    step = STEPS[name]
    words = [settings.pythons[step.engine], "-m", step.module, *step.options.split()]
    if name != "driver":
        words += ["--out", str(settings.out / f"{name}.json")]
    if step.logs:
        words += ["--logs", str(settings.out / "logs" / name)]
    if step.headroom and settings.headroom:
        words += ["--headroom", settings.headroom]
    if name == "beside":
        for engine in ENGINES:
            words += [f"--{engine}-python", settings.pythons[engine]]
            if site := settings.sites[engine]:
                words += [f"--{engine}-site", str(site)]
    return words


def environment(name: str, settings: Settings) -> dict[str, str]:
    """Return the caller's environment with the packages of the step's engine in front."""
    # `beside` starts a server of each engine and gives each server its own packages
    site = None if name == "beside" else settings.sites[STEPS[name].engine]
    paths = [str(site)] if site else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def run(words: Sequence[str], environ: dict[str, str], log: Path, seconds: float) -> int | None:
    """Run a command, then end its process group; return the exit status, or None after `seconds`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, start_new_session=True)  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process as Ctrl-C does, then kill the rest of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(names: Sequence[str], settings: Settings) -> list[str]:
    """Run the steps and print the outcome of each; return the steps that failed."""
    failed = []
    for number, name in enumerate(names, 1):
        log, limit = settings.out / "logs" / f"{name}.log", STEPS[name].seconds
        print(f"[{number}/{len(names)}] {name}, at most {limit} s: {log}", flush=True)
        begun = time.monotonic()
        status = run(command(name, settings), environment(name, settings), log, limit)
        said = {None: "late: stopped", 0: "done"}.get(status, f"failed with status {status}")
        print(f"      {said} after {time.monotonic() - begun:.0f} s", flush=True)
        if status != 0:
            failed.append(name)
            print("      " + "\n      ".join(log.read_text(errors="replace").splitlines()[-5:]), flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu-suite"), help="folder for results and logs"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
                        help=f"default, in this order: {' '.join(STEPS)}")  # fmt: skip
    for engine in ENGINES:
        parser.add_argument(f"--{engine}-python", default=sys.executable, metavar="PYTHON")
        parser.add_argument(f"--{engine}-site", type=Path, help="folder of packages for this engine alone")
    parser.add_argument("--headroom", help="GPU memory to leave unused where a step permits it, e.g. 56GiB")
    parser.add_argument("--print", action="store_true", help="print the commands instead of running them")
    options = parser.parse_args(arguments)
    given = vars(options)
    settings = Settings(
        options.out.absolute(),
        {engine: given[f"{engine}_python"] for engine in ENGINES},
        {engine: given[f"{engine}_site"] for engine in ENGINES},
        options.headroom,
    )
    if options.print:
        for name in options.steps:
            print(shlex.join(command(name, settings)))
        return 0
    try:
        failed = run_all(options.steps, settings)
    except KeyboardInterrupt:
        print("interrupted; the results so far are in", settings.out, flush=True)
        return 130
    print(f"results: {settings.out}" + (f"; failed: {', '.join(failed)}" if failed else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
