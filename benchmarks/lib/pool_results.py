"""Pool several runs of one benchmark into one result, and compute the ratios from the pooled samples.

    python -m benchmarks.lib.pool_results RUN.json RUN.json --out benchmarks/results/NAME.json

The runs must have the same commit, device and versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.lib import options as options_of
from benchmarks.lib.record import save, valued

_SAME = ("schema", "commit", "clean", "device", "versions")


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one result with all samples. Raises ValueError if the commit, device or versions differ."""
    first = runs[0]
    for name in _SAME:
        if any(run[name] != first[name] for run in runs):
            raise ValueError(f"the runs differ in {name}")
    samples: dict[str, list[float]] = {}
    for run in runs:
        for name, values in run["samples"].items():
            samples.setdefault(name, []).extend(values)
    return first | {
        "samples": samples,
        "ratios": valued(first["ratios"], samples),
        "wall_seconds": sum(run["wall_seconds"] for run in runs),
        "notes": {
            "pooled": [
                {name: run[name] for name in ("command", "started", "notes", "ratios")} for run in runs
            ]
        },
    }


def main() -> None:
    """Pool the runs and write the result."""
    parser = options_of.parser("lib.pool_results", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    options = parser.parse_args()
    result = pooled([json.loads(path.read_text()) for path in options.runs])
    save(options.out, result)
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
