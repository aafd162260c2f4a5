"""Check benchmarks/results/*.json: complete, from a clean commit, and with ratios that match the raw samples.

`python -m tools.check_results [FOLDER]`; exit status 1 if anything is wrong.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from devkit.statistics import ratio

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
TOLERANCE = 1e-6  # relative
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "commit": str,
    "clean": bool,
    "device": dict,
    "versions": dict,
    "command": list,
    "started": str,
    "wall_seconds": (int, float),
    "samples": dict,
    "ratios": dict,
}


def check_result(result: Any) -> list[str]:
    """Return one sentence for each fault of a result."""
    if not isinstance(result, dict):
        return ["expected an object"]
    wrong = [f"{name}: missing" for name in FIELDS if name not in result]
    wrong += [
        f"{n}: wrong type" for n, kind in FIELDS.items() if n in result and not isinstance(result[n], kind)
    ]
    return wrong or [*_origin(result), *_samples(result["samples"]), *_ratios(result)]


def _origin(result: dict[str, Any]) -> Iterator[str]:
    """Check commit, device, versions, command and time."""
    if result["schema"] != 1:
        yield f"schema: expected 1, got {result['schema']}"
    if not re.fullmatch(r"[0-9a-f]{40}", result["commit"]):
        yield "commit: expected 40 hex digits"
    if not result["clean"]:
        yield "clean: the tree had changes that no commit holds"
    for name in ("name", "uuid", "driver"):
        if not isinstance(result["device"].get(name), str) or not result["device"][name]:
            yield f"device.{name}: missing"
    if not result["versions"].get("python"):
        yield "versions.python: missing"
    if not result["command"] or not all(isinstance(word, str) for word in result["command"]):
        yield "command: expected the words of a command line"
    try:
        datetime.fromisoformat(result["started"])
    except ValueError:
        yield "started: expected an ISO 8601 time"
    if not 0 < result["wall_seconds"] < math.inf:
        yield "wall_seconds: expected a positive number"


def _samples(samples: dict[str, Any]) -> Iterator[str]:
    if not samples:
        yield "samples: empty"
    for name, values in samples.items():
        if not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
            yield f"samples.{name}: expected a list of finite numbers, not empty"


def _ratios(result: dict[str, Any]) -> Iterator[str]:
    """Recompute every ratio from the raw samples."""
    for name, claim in result["ratios"].items():
        try:
            above, below = (result["samples"][claim[side]] for side in ("numerator", "denominator"))
            true = ratio(above, below, claim["statistic"])
            if not _is_number(claim["value"]) or not math.isclose(claim["value"], true, rel_tol=TOLERANCE):
                yield f"ratios.{name}: says {claim['value']}, the samples give {true}"
        except (KeyError, TypeError, ValueError) as error:
            yield f"ratios.{name}: {type(error).__name__}: {error}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_folder(folder: Path) -> list[str]:
    """Check every JSON file in a folder; returns sentences that begin with the file's name."""
    wrong = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = check_result(json.loads(path.read_text()))
        except ValueError as error:
            found = [f"not JSON: {error}"]
        wrong += [f"{path.name}: {sentence}" for sentence in found]
    return wrong


def main(arguments: list[str]) -> int:
    """Check one folder; returns the exit status."""
    wrong = check_folder(Path(arguments[0]) if arguments else RESULTS)
    print("\n".join(wrong) or "results: all complete, all ratios follow from their samples")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
