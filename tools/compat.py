"""Check every seam of vLLM that the plugin relies on against released wheels, without installing them.

`python -m tools.compat [WHEEL_OR_FOLDER ...]`: without arguments, the wheels of VERSIONS are downloaded into
build/wheels and kept. Exit status 1 if a seam is missing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.seam_checks import Source, check_seam, seams

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "wheels"
VERSIONS = ("0.30.0", "0.32.0", "0.33.0")


class Row(NamedTuple):
    """One seam in one version; `problem` is empty where it is as expected."""

    version: str
    seam: str
    problem: str


def wheel(version: str, folder: Path = WHEELS) -> Path:
    """Return vLLM's wheel of a version, downloaded if need be, whole or not at all."""
    found = sorted(folder.glob(f"vllm-{version}-*.whl"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading the wheel of vllm {version} without its dependencies ...", flush=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        target = ["--only-binary", ":all:", "--progress-bar", "off", "--dest", part, f"vllm=={version}"]
        subprocess.run([*command, *target], check=True)
        (made,) = Path(part).glob("vllm-*.whl")
        return made.replace(folder / made.name)


def check(version: str, source: Source) -> list[Row]:
    """Check all seams of the plugin in one version's source."""
    return [Row(version, f"{s.module}:{s.qualname}", check_seam(source, s)) for s in seams()]


def table(rows: Sequence[Row]) -> str:
    """Write seams as lines and versions as columns, then what is wrong."""
    versions = list(dict.fromkeys(row.version for row in rows))
    names = list(dict.fromkeys(row.seam for row in rows))
    problems = {(row.version, row.seam): row.problem for row in rows}
    width = max((len(name) for name in names), default=4)
    lines = ["  ".join([f"{'seam':{width}}", *(f"{v:>10}" for v in versions)])]
    for name in names:
        marks = (f"{'MISSING' if problems[version, name] else 'ok':>10}" for version in versions)
        lines.append("  ".join([f"{name:{width}}", *marks]))
    lines += [f"vllm {row.version}: {row.seam}: {row.problem}" for row in rows if row.problem]
    return "\n".join(lines)


def run(sources: Iterable[tuple[str, Path]]) -> int:
    """Check (version, wheel or folder) pairs and print the table; returns the exit status."""
    rows: list[Row] = []
    for version, path in sources:
        with Source(path) as source:
            rows += check(version, source)
    print(table(rows))
    missing = sum(bool(row.problem) for row in rows)
    print(f"{len(rows)} seams checked, {missing} missing")
    return 1 if missing or not rows else 0


def main(arguments: Sequence[str]) -> int:
    """Check the paths given, or the wheels of all supported versions."""
    if arguments:
        return run(
            (Path(name).name.removeprefix("vllm-").partition("-")[0], Path(name)) for name in arguments
        )
    return run([(version, wheel(version)) for version in VERSIONS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
