"""Build the wheels of all distributions: `python -m tools.wheels FOLDER`.

The wheels are built from a copy of the sources, so no file of an earlier build gets into them and no build
file is left in the source tree.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# distribution: (folder of its pyproject.toml, its package), both relative to the root
DISTRIBUTIONS = {
    "kvcached-core": (Path(), Path("kvcached_core")),
    "kvctl": (Path("cli"), Path("cli/kvctl")),
    "vllm-kvcached": (Path("plugins/vllm_kvcached"), Path("plugins/vllm_kvcached/vllm_kvcached")),
    "sglang-kvcached": (Path("plugins/sglang_kvcached"), Path("plugins/sglang_kvcached/sglang_kvcached")),
}
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


def copy_sources(name: str, target: Path) -> Path:
    """Copy the sources of a distribution into `target`; return the folder to build in."""
    folder, package = DISTRIBUTIONS[name]
    target.mkdir(parents=True)
    shutil.copy(ROOT / folder / "pyproject.toml", target)
    shutil.copy(ROOT / "LICENSE", target)
    shutil.copytree(ROOT / package, target / package.name, ignore=_LEFT_OUT)
    return target


def build(target: Path) -> dict[str, Path]:
    """Build every wheel into `target` and return the paths by distribution.

    Raises subprocess.CalledProcessError if a build fails; the build's output goes to stderr.
    """
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    with tempfile.TemporaryDirectory() as scratch:
        sources = [str(copy_sources(name, Path(scratch) / name)) for name in DISTRIBUTIONS]
        subprocess.run([*command, *sources], check=True, stdout=sys.stderr)
    return {name: next(target.glob(f"{name.replace('-', '_')}-*.whl")) for name in DISTRIBUTIONS}


def main(arguments: list[str]) -> int:
    """Empty the given folder and build into it; returns the exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    target = Path(arguments[0])
    for old in target.glob("*.whl"):
        old.unlink()
    for path in build(target).values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
