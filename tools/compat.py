"""Check that released engines still have the functions and classes that the plugins rely on (seams).

`python -m tools.compat [WHEEL_OR_FOLDER ...]`: the wheels are read, not installed. Without arguments, the
wheels of ENGINES are downloaded into build/wheels and kept. The name of a path begins with its engine:
vllm-..., sglang-... Exit status 1 if a seam is missing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.seam_checks import Source, check_seam, seams

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "wheels"
NEWEST = "newest"
ENGINES: Mapping[str, Sequence[str]] = {
    "vllm": ("0.30.0", "0.32.0", "0.33.0"),
    "sglang": ("0.5.23", NEWEST),
}


class Row(NamedTuple):
    """One seam in one version of an engine; `problem` is empty if the seam is as expected."""

    engine: str
    version: str
    seam: str
    problem: str


def wheel(engine: str, version: str, folder: Path = WHEELS) -> Path:
    """Return the path of an engine's wheel of a version; download the wheel if it is missing."""
    found = [] if version == NEWEST else sorted(folder.glob(f"{engine}-{version}-*.whl"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading the wheel of {engine} {version} without its dependencies ...", flush=True)
    asked = engine if version == NEWEST else f"{engine}=={version}"
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        target = ["--only-binary", ":all:", "--progress-bar", "off", "--dest", part, asked]
        subprocess.run([*command, *target], check=True)
        (made,) = Path(part).glob(f"{engine}-*.whl")
        return made.replace(folder / made.name)


def version_of(path: Path) -> str:
    """Return the version in the name of a wheel or of an unpacked wheel's folder."""
    return path.name.split("-")[1]


def engine_of(path: Path) -> str:
    """Return the engine whose name the path begins with; raises ValueError if there is none."""
    engine = path.name.split("-")[0]
    if engine not in ENGINES:
        raise ValueError(f"{path}: expected a name that begins with {' or '.join(ENGINES)} and a hyphen")
    return engine


def check(engine: str, version: str, source: Source) -> list[Row]:
    """Check all seams of an engine's plugin in one version's source."""
    return [Row(engine, version, f"{s.module}:{s.qualname}", check_seam(source, s)) for s in seams(engine)]


def table(rows: Sequence[Row]) -> str:
    """Return a table with a line for each seam and a column for each version, then the problems."""
    versions = list(dict.fromkeys(row.version for row in rows))
    names = list(dict.fromkeys(row.seam for row in rows))
    problems = {(row.version, row.seam): row.problem for row in rows}
    width = max((len(name) for name in names), default=4)
    lines = ["  ".join([f"{'seam':{width}}", *(f"{v:>10}" for v in versions)])]
    for name in names:
        marks = (f"{'MISSING' if problems[version, name] else 'ok':>10}" for version in versions)
        lines.append("  ".join([f"{name:{width}}", *marks]))
    lines += [f"{row.engine} {row.version}: {row.seam}: {row.problem}" for row in rows if row.problem]
    return "\n".join(lines)


def run(paths: Iterable[Path]) -> int:
    """Check wheels or folders and print a table for each engine; returns the exit status."""
    rows: list[Row] = []
    for path in dict.fromkeys(paths):
        with Source(path) as source:
            rows += check(engine_of(path), version_of(path), source)
    for engine in dict.fromkeys(row.engine for row in rows):
        print(f"{engine}\n{table([row for row in rows if row.engine == engine])}")
    missing = sum(bool(row.problem) for row in rows)
    print(f"{len(rows)} seams checked, {missing} missing")
    return 1 if missing or not rows else 0


def main(arguments: Sequence[str]) -> int:
    """Check the paths given, or the wheels of all supported versions."""
    if arguments:
        return run(map(Path, arguments))
    return run(wheel(engine, version) for engine, versions in ENGINES.items() for version in versions)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
