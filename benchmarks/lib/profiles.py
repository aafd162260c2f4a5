"""Summarise a trace of PyTorch's profiler: kernels by name, and how long the device was busy."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "kvcached.trace.json"  # file name of a trace that a benchmark has an engine write
KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
KEPT = 30  # the kernels with the longest total time
_NAME_LENGTH = 120
_SHORT_GAP = 500.0  # us


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the only trace in a folder. Raises ValueError unless there is exactly one."""
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith((".json", ".json.gz")))
    if len(paths) != 1:
        raise ValueError(f"one trace was expected in {folder}, found {[path.name for path in paths]}")
    raw = paths[0].read_bytes()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)[
        "traceEvents"
    ]
    return events


def summary(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return a summary, with times in seconds.

    `span` is the time from the first to the last kernel, `busy` the time with at least one running kernel.
    `kernels` has the name, the number of runs and the total time of each. `gaps` has each time without a
    kernel that was longer than half a millisecond: its begin since the first kernel, and its length.
    """
    ran = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in KINDS
    )
    busy, until = 0.0, float("-inf")
    gaps: list[tuple[float, float]] = []
    sums: dict[str, tuple[int, float]] = {}
    for begun, ended, name in ran:
        busy += max(0.0, ended - max(begun, until))
        if until + _SHORT_GAP < begun and until > float("-inf"):
            gaps.append(((until - ran[0][0]) / 1e6, (begun - until) / 1e6))
        until = max(until, ended)
        count, total = sums.get(name, (0, 0.0))
        sums[name] = (count + 1, total + ended - begun)
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:KEPT]
    return {
        "span": (until - ran[0][0]) / 1e6 if ran else 0.0,
        "busy": busy / 1e6,
        "gaps": gaps,
        "kernels": [
            {"name": name[:_NAME_LENGTH], "count": count, "seconds": total / 1e6}
            for name, (count, total) in longest
        ],
    }
