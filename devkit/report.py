"""Count the work that tests do, over all processes; tools/test_report.py compares the sums with minima."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

VARIABLE = "TEST_REPORT_DIR"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "build" / "test-report.d"


def folder() -> Path:
    """Return the folder of the counts; it need not exist yet."""
    return Path(os.environ.get(VARIABLE) or DEFAULT_FOLDER)


def record(key: str, n: int) -> None:
    """Add `n` (not negative) to the count named `key`. Safe in any process and thread."""
    if n < 0:
        raise ValueError(f"{key}: a count cannot fall, got {n}")
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, "n": n}) + "\n"
    # one write() of one short line to a file opened for appending: lines never mix
    descriptor = os.open(target / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def collect(source: Path) -> dict[str, int]:
    """Return the sum for each key over all files in `source`, by key."""
    counts: Counter[str] = Counter()
    for path in sorted(source.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            counts[entry["key"]] += entry["n"]
    return dict(sorted(counts.items()))
