"""Write build/test-report.json from the tests' counts, and fail if a count is below its minimum."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from devkit.report import collect, folder
from tools.test_runs import REPORTS as JUNITS

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "test-report.json"

# A suite that does less work than this is broken, even if every test passes.
MINIMA: dict[str, int] = {
    "driver.injected_failures": 50,
    "engine.kills": 2,
    "granules.steps": 5_000,
    "kvctl.wrong_calls": 60,
    "ledger.attached_at_once": 64,
    "ledger.byte_flips": 1_000_000,
    "ledger.damaged_parses": 100_000,
    "ledger.examples": 1_000,
    "ledger.kills": 1_000,
    "ledger.leases": 24_000,
    "ledger.random_kills": 200,
    "ledger.settled": 1_000,
    "ledger.steps": 30_000,
    "ledger.write_points": 700,
    "lint.runs": 10,
    "nodes.steps": 5_000,
    "pool.steps": 2_000,
    "requests.compared": 800,
    "requests.control_compared": 200,
    "sglang.compared": 970,  # with one run of each load; a load runs on if limits moved too rarely
    "sglang.compared_tp2": 200,
    "sglang.control_compared": 200,
    "sglang.kills": 1,
    "sglang.limits_tp2": 3,
    "sglang.stress_limits": 4,
    "sglang.stress_requests": 200,
    "stress.requests": 300,
}


def outcomes(junits: Sequence[Path]) -> dict[str, int]:
    """Return the sums of pytest's XML reports: tests, passed, failures, errors, skipped."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for junit in junits:
        for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
            for name in totals:
                totals[name] += int(suite.get(name, "0"))
    totals["passed"] = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    return totals


def skips(junits: Sequence[Path]) -> dict[str, int]:
    """Return the number of skipped tests by reason."""
    found = (skip for junit in junits for skip in ElementTree.parse(junit).getroot().iter("skipped"))
    return dict(Counter(skip.get("message", "no reason given") for skip in found))


def shortfalls(counts: Mapping[str, int], minima: Mapping[str, int]) -> list[str]:
    """Return one sentence for each count under its minimum."""
    return [
        f"{key}: {counts.get(key, 0)} counted, at least {least} expected"
        for key, least in minima.items()
        if counts.get(key, 0) < least
    ]


def write(report: Path, junits: Sequence[Path], source: Path, minima: Mapping[str, int]) -> list[str]:
    """Write the report as JSON, whole or not at all, and return a sentence for each problem."""
    counts, tests = collect(source), outcomes(junits)
    wrong = shortfalls(counts, minima)
    if tests["failures"] or tests["errors"]:
        wrong.append(f"pytest: {tests['failures']} failures, {tests['errors']} errors")
    text = {"schema": 1, "tests": tests, "skips": skips(junits), "counts": counts,
            "minima": dict(minima), "wrong": wrong}  # fmt: skip
    part = report.with_suffix(".part")
    part.write_text(json.dumps(text, indent=2) + "\n")
    os.replace(part, report)
    return wrong


def main() -> int:
    """Report on the last run of the suite; exit status 1 if anything is wrong."""
    wrong = write(REPORT, JUNITS, folder(), MINIMA)
    for sentence in wrong:
        print(f"test report: {sentence}", file=sys.stderr)
    for reason, count in skips(JUNITS).items():
        print(f"test report: {count} skipped: {reason}", file=sys.stderr)
    if not wrong:
        print(f"test report: every count is at its minimum or above ({REPORT.relative_to(ROOT)})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
